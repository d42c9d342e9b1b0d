"""Prompts: what becomes of an instruction, by hand and against the goldens' token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import PromptSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.prompts import Tokenizer, format_bins

DATA = Path(__file__).parent / "data"


@pytest.fixture
def tokenizer_file(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> Path:
    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_tokenizer(tokenizer_file: Path) -> None:
    ids = Tokenizer(tokenizer_file, PromptSpec("the {instruction}", 5, pad_id=6))("open drawer")
    assert ids.dtype == np.int64
    assert ids.tolist() == [4, 2, 5, 6, 6]  # PAD UNK open close the drawer window


def test_tokenizer_template_takes_braces_as_they_are(tokenizer_file: Path) -> None:
    ids = Tokenizer(tokenizer_file, PromptSpec("{} {instruction}", 5, 0))("{instruction}")
    assert ids.tolist() == [1, 1, 1, 1, 0]  # the words "{}", "{", "instruction" and "}" are unknown


def test_tokenizer_refuses_what_does_not_fit(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 2 tokens .* found 3 in 'open the drawer'; shorten it"):
        Tokenizer(tokenizer_file, PromptSpec("{instruction}", 2, 0))("open the drawer")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"expected a tokenizers file, found .*broken.json"):
        Tokenizer(tmp_path / "broken.json", PromptSpec("{instruction}", 2, 0))


def test_tokenizer_ignores_padding_and_truncation_of_its_file(tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer as Tokenizers

    carrying = Tokenizers.from_file(str(tokenizer_file))
    carrying.enable_padding(length=9)
    carrying.enable_truncation(1)
    carrying.save(str(tokenizer_file))
    assert Tokenizer(tokenizer_file, PromptSpec("{instruction}", 4, 0))("open the drawer").tolist() == [2, 4, 5, 0]


def test_edits_in_order(tokenizer_file: Path) -> None:
    def text(*edits: Any) -> str:
        return Tokenizer(tokenizer_file, PromptSpec("<{instruction}>", 5, 0, edits=edits)).text(" Open_the\nDrawer ")

    assert text() == "< Open_the\nDrawer >"
    assert text("lower") == "< open_the\ndrawer >"
    assert text("strip", "blanks") == "<Open the Drawer>"
    assert text("blanks") == "< Open the Drawer >"
    assert text("newline") == "< Open_the\nDrawer \n>"
    assert text("newline", "newline") == text("newline")  # there is one already


def test_state_in_the_prompt(tokenizer_file: Path) -> None:
    prompt = PromptSpec("{instruction}, State: {state};", 9, 0, state_bins=4)
    state = np.array([-1.5, -1.0, -0.51, -0.5, 0.0, 0.49, 0.99, 1.0, 7.0], np.float32)
    # Bins of [-1, 1] begin at -1, -0.5, 0 and 0.5; what lies below is -1, what lies above is in the last.
    numbers = "-1 0 0 1 2 2 3 3 3"
    assert format_bins(state, 4) == numbers
    assert Tokenizer(tokenizer_file, prompt).text("go {state}", state) == f"go {{state}}, State: {numbers};"
    # Padded with zeros, whose bin is 2, but never cut.
    wide = replace(prompt, state_width=11)
    assert Tokenizer(tokenizer_file, wide).text("go", state) == f"go, State: {numbers} 2 2;"
    assert Tokenizer(tokenizer_file, replace(prompt, state_width=9)).text("go", state) == f"go, State: {numbers};"


def test_ids_follow_the_state(tokenizer_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers import models, pre_tokenizers

    numbers = Tokenizers(models.WordLevel({str(i): i for i in range(9)} | {"open": 9}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()
    numbers.save(str(tmp_path / "numbers.json"))
    tokenizer = Tokenizer(tmp_path / "numbers.json", PromptSpec("{instruction} {state}", 5, None, state_bins=8))
    assert tokenizer("open", np.array([0.0, 0.99])).tolist() == [9, 4, 7]
    assert tokenizer("open", np.array([-0.9, 0.99])).tolist() == [9, 0, 7]


def test_suffix_is_appended_once(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file, PromptSpec("{instruction}", 4, None, suffix=(4, 5)))
    assert tokenizer("open").tolist() == [2, 4, 5]
    assert tokenizer("open the drawer").tolist() == [2, 4, 5]  # it ends with them
    assert tokenizer("the").tolist() == [4, 4, 5]
    with pytest.raises(UserError, match=r"at most 4 tokens .* found 5"):
        tokenizer("open the window")


def test_truncation_leaves_room_for_the_suffix(tokenizer_file: Path) -> None:
    prompt = PromptSpec("{instruction}", 3, None, truncate=True)
    assert Tokenizer(tokenizer_file, prompt)("open the drawer close the window").tolist() == [2, 4, 5]
    assert Tokenizer(tokenizer_file, prompt)("open").tolist() == [2]
    suffixed = Tokenizer(tokenizer_file, replace(prompt, suffix=(6,)))
    assert suffixed("open the drawer").tolist() == [2, 4, 6]


def test_ids_may_be_written_into(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file, PromptSpec("{instruction}", 5, 0))
    tokenizer("open")[:] = 0
    assert tokenizer("open").tolist() == [2, 0, 0, 0, 0]


def test_another_vocabulary_is_refused(tokenizer_file: Path) -> None:
    Tokenizer(tokenizer_file, PromptSpec("{instruction}", 5, 0, known={"open": 2, "drawer": 5}))
    with pytest.raises(UserError, match=r"expected the piece 'drawer' to be token 7 in .*tokenizer.json, found 5; use"):
        Tokenizer(tokenizer_file, PromptSpec("{instruction}", 5, 0, known={"open": 2, "drawer": 7}))
    with pytest.raises(UserError, match=r"the piece '▁' to be token 29871 .* found no such piece"):
        Tokenizer(tokenizer_file, PromptSpec("{instruction}", 5, 0, known={"▁": 29871}))


OPENVLA = PromptSpec(
    "In: What action should the robot take to {instruction}?\nOut:", 64, None, ("lower",), (29871,), known={"▁": 29871}
)


@pytest.mark.parametrize("family", ["openvla", "openvla-oft-l1", "openvla-oft-discrete"])
def test_ids_of_openvla(family: str) -> None:
    tokenizer = Tokenizer(DATA / "openvla/checkpoint/tokenizer.json", OPENVLA)
    golden, described = np.load(DATA / family / "golden.npz"), json.loads((DATA / family / "golden.json").read_text())
    for i, observation in enumerate(described["observations"]):
        assert tokenizer.text(observation["instruction"]) == observation["prompt"]
        # The goldens are without the last token, which the official model appends.
        assert tokenizer(observation["instruction"].title()).tolist() == [*golden[f"obs{i}.input_ids"][0], 29871]


PI05 = "Task: {instruction}, State: {state};\nAction: "


@pytest.mark.parametrize(
    ("family", "tokenizer", "prompt"),
    [
        ("pi0", "tokenizer", PromptSpec("{instruction}", 48, 0, ("newline",), known={"<bos>": 2}, truncate=True)),
        ("pi05", "tokenizer", PromptSpec(PI05, 120, 0, ("strip", "blanks"), state_bins=256, truncate=True)),
        ("smolvla", "tiny_smolvlm", PromptSpec("{instruction}", 48, None, ("newline",), truncate=True)),
    ],
)
def test_ids_of_lerobot(family: str, tokenizer: str, prompt: PromptSpec) -> None:
    golden, described = np.load(DATA / family / "golden.npz"), json.loads((DATA / family / "golden.json").read_text())
    tokenize = Tokenizer(DATA / family / tokenizer / "tokenizer.json", prompt)
    for i, observation in enumerate(described["observations"]):
        words = (observation["instruction"], golden["state_normalized"][i])
        assert (
            tokenize.text(*words)
            == described["decoded_prompts"][i].removeprefix("<bos>").split("<pad>")[0].split("<|im_end|>")[0]
        )
        expected = golden["input_ids"][i]
        if prompt.pad_id is None:
            expected = expected[golden["attention_mask"][i]]
        assert tokenize(*words).tolist() == expected.tolist()
