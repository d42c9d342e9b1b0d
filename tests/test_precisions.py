"""The table of precisions agrees with those who read it."""

from __future__ import annotations

from typing import get_args

import pytest

from rlrc.artifact.precisions import CHOICES, PRECISIONS, ExportPrecision, TensorRTPrecision, find_precision
from rlrc.errors import UserError
from rlrc.runtime.inference.backends import FOLDERS


def test_every_choice_of_every_backend_is_in_the_table_and_on_the_command_line() -> None:
    assert CHOICES.keys() == FOLDERS.keys()
    chosen = {name for grids in CHOICES.values() for names in grids.values() for name in names}
    assert chosen <= PRECISIONS.keys()
    assert chosen - {"fp8"} == set(get_args(ExportPrecision))  # fp8 is exported from Python only
    assert {name for names in CHOICES["tensorrt"].values() for name in names} == set(get_args(TensorRTPrecision))
    assert all(PRECISIONS[name].least_sm for name in get_args(TensorRTPrecision))


def test_onnx_formats_are_precisions_and_exact_where_they_compute_in_floats() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from rlrc.exporters.onnx.builder import FORMATS

    for name, form in FORMATS.items():
        assert ("onnxruntime" in PRECISIONS[name].exact) == (form.products in ("float", "int4"))
        assert not form.packed or PRECISIONS[name].in_memory == 8


def test_names_are_found_by_their_aliases() -> None:
    assert find_precision("Float16") is PRECISIONS["fp16"]
    with pytest.raises(UserError, match=r"expected a precision of fp32, fp16, .* found 'int3'"):
        find_precision("int3")
