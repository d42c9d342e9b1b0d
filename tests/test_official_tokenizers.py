"""Tokenizers of official folders: where they are found, and sentencepiece models, which give sentencepiece's ids."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rlrc.compressor import official, tokenizers
from rlrc.compressor.inference import tokenizer_of
from rlrc.compressor.official import Options, open_folder
from rlrc.errors import UserError

DATA = Path(__file__).parent / "data"
MODELS = DATA / "sentencepiece"
TRUTH = json.loads((MODELS / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["llama", "gemma", "unigram"])
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    """make.py beside the models trained them and asked sentencepiece 0.2.3."""
    tokenizers.write(MODELS / f"{name}.model", tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in zip(TRUTH["texts"], TRUTH["ids"][name], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_begin_and_end() -> None:
    llama, gemma = (tokenizers.convert(MODELS / f"{name}.model") for name in ("llama", "gemma"))
    assert llama.encode("close drawer").tokens[:2] == ["<s>", "▁close"]
    assert gemma.encode("close drawer").tokens == ["<bos>", "close", "▁drawer"]
    assert gemma.decode(gemma.encode("close drawer").ids) == "close drawer"
    assert llama.decode(llama.encode("close é drawer").ids) == "close é drawer"
    assert gemma.encode("</s><eos>", add_special_tokens=False).tokens[-1] == "<eos>"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"add_bos_token": False}, ["close", "▁drawer"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["close", "▁drawer", "<eos>"]),
        ({"add_eos_token": True}, ["<bos>", "close", "▁drawer", "<eos>"]),
        (["no object"], ["<bos>", "close", "▁drawer"]),
    ],
)
def test_tokenizer_config_says_what_stands_at_the_ends(tmp_path: Path, config: Any, tokens: list[str]) -> None:
    shutil.copy(MODELS / "gemma.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizers.convert(tmp_path / "tokenizer.model").encode("close drawer").tokens == tokens


@pytest.mark.parametrize("data", [b"", b"\0" * 50, b"no protocol buffer at all", b"\x0a\x7f", b"\x0a\x03\x0a\x01a"])
def test_no_sentencepiece_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=r"expected .* in .*tokenizer.model, found"):
        tokenizers.convert(tmp_path / "tokenizer.model")


def test_a_damaged_model(tmp_path: Path) -> None:
    data = (MODELS / "llama.model").read_bytes()
    for length in range(1, len(data), 97):
        (tmp_path / "tokenizer.model").write_bytes(data[:length])
        with contextlib.suppress(UserError):  # and nothing else; between two pieces the end is a smaller model's
            tokenizers.convert(tmp_path / "tokenizer.model")


def test_where_a_tokenizer_is_looked_for(tmp_path: Path) -> None:
    path = shutil.copytree(DATA / "smolvla/checkpoint", tmp_path / "checkpoint")
    folder = open_folder(path)
    with pytest.raises(
        UserError, match=r"in .*checkpoint, found neither; .*\(it is that of tiny_smolvlm\) as --tokenizer"
    ):
        tokenizers.of_folder(folder, Options())
    named = shutil.copytree(DATA / "smolvla/tiny_smolvlm", tmp_path / "tiny_smolvlm") / "tokenizer.json"
    assert tokenizers.of_folder(folder, Options()) == named  # the name in config.json, beside the checkpoint
    hinted = shutil.copytree(named.parent, tmp_path / "hinted") / "tokenizer.json"
    assert tokenizers.of_folder(folder, Options({"tokenizer": str(hinted.parent)})) == hinted
    shutil.copy(MODELS / "llama.model", path / "tokenizer.model")
    assert tokenizers.of_folder(folder, Options({"tokenizer": str(hinted.parent)})) == path / "tokenizer.model"
    shutil.copy(named, path)
    assert tokenizers.of_folder(folder, Options()) == path / "tokenizer.json"
    assert tokenizers.of_folder(folder, Options(tokenizer=hinted)) == hinted
    assert tokenizers.of_folder(folder, Options(tokenizer=hinted.parent)) == hinted
    with pytest.raises(UserError, match=r"expected tokenizer.json or tokenizer.model in .*nowhere, found neither"):
        tokenizers.of_folder(folder, Options(tokenizer=tmp_path / "nowhere"))


def test_a_wrong_vocabulary_is_refused() -> None:
    """Llama's pieces have known ids; these of another vocabulary would be understood as other words."""
    folder = open_folder(DATA / "openvla/checkpoint")
    options = Options(official.read_hints(DATA / "openvla/golden.json"))
    spec = official.recognise(folder).layout(folder, options).spec
    assert tokenizer_of(folder, options, spec) is not None
    with pytest.raises(UserError, match="use the tokenizer that the policy was trained with"):
        tokenizer_of(folder, replace(options, tokenizer=MODELS / "llama.model"), spec)


def test_a_policy_without_language_needs_none() -> None:
    folder = open_folder(DATA / "act/checkpoint")
    spec = official.recognise(folder).layout(folder, Options()).spec
    assert tokenizer_of(folder, Options(), spec) is None
