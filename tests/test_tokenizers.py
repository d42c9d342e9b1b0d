"""Tokenizers of official folders: where they are found, and sentencepiece models, which give sentencepiece's ids."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from rlrc.compressor.checkpoints import folder as official
from rlrc.compressor.checkpoints import reader, tokenizers
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy, tokenizer_of
from rlrc.errors import UserError
from rlrc.runtime.inference import preprocess

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
        tokenizers.of_folder(folder, ReadOptions())
    named = shutil.copytree(DATA / "smolvla/tiny_smolvlm", tmp_path / "tiny_smolvlm") / "tokenizer.json"
    assert tokenizers.of_folder(folder, ReadOptions()) == named  # the name in config.json, beside the checkpoint
    hinted = shutil.copytree(named.parent, tmp_path / "hinted") / "tokenizer.json"
    assert tokenizers.of_folder(folder, ReadOptions({"tokenizer": str(hinted.parent)})) == hinted
    shutil.copy(MODELS / "llama.model", path / "tokenizer.model")
    assert tokenizers.of_folder(folder, ReadOptions({"tokenizer": str(hinted.parent)})) == path / "tokenizer.model"
    shutil.copy(named, path)
    assert tokenizers.of_folder(folder, ReadOptions()) == path / "tokenizer.json"
    assert tokenizers.of_folder(folder, ReadOptions(tokenizer=hinted)) == hinted
    assert tokenizers.of_folder(folder, ReadOptions(tokenizer=hinted.parent)) == hinted
    with pytest.raises(UserError, match=r"expected tokenizer.json or tokenizer.model in .*nowhere, found neither"):
        tokenizers.of_folder(folder, ReadOptions(tokenizer=tmp_path / "nowhere"))


def test_a_wrong_vocabulary_is_refused() -> None:
    """Llama's pieces have known ids; these of another vocabulary would be understood as other words."""
    folder = open_folder(DATA / "openvla/checkpoint")
    options = ReadOptions(official.read_hints(DATA / "openvla/golden.json"))
    spec = reader.layout(folder, options).spec
    assert tokenizer_of(folder, options, spec) is not None
    with pytest.raises(UserError, match="use the tokenizer that the policy was trained with"):
        tokenizer_of(folder, replace(options, tokenizer=MODELS / "llama.model"), spec)


def test_a_policy_without_language_needs_none() -> None:
    folder = open_folder(DATA / "act/checkpoint")
    spec = reader.layout(folder, ReadOptions()).spec
    assert tokenizer_of(folder, ReadOptions(), spec) is None


# Llama 2's of "In: What action should the robot take to close the drawer?\nOut:".
IDS = [512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 3802, 278, 7482, 556, 29973, 13, 3744, 29901]


def edited(path: Path, **values: Any) -> None:
    kept = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({name: value for name, value in kept.items() if value != "REMOVED"}))


def opened(path: Path, family: str = "openvla") -> Any:
    """The tokenizer at the path, as the golden's policy gets it."""
    folder = open_folder(DATA / family / "checkpoint")
    options = ReadOptions(official.read_hints(DATA / family / "golden.json"), tokenizer=path)
    spec = reader.layout(folder, options).spec
    tokenizer = tokenizer_of(folder, options, spec)
    assert tokenizer is not None
    return tokenizer


def state(spec: Any) -> Any:
    return None if spec.state is None else np.zeros(len(spec.state.names), np.float32)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DATA / "openvla/checkpoint" / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "config", "begin", "end"),
    [
        ({"post_processor": None}, {}, [1], []),
        ({"post_processor": None}, {"add_bos_token": "REMOVED", "add_eos_token": "REMOVED"}, [1], []),  # Llama's own
        ({"post_processor": None}, {"add_eos_token": True}, [1], [2]),
        ({"post_processor": None}, {"bos_token": {"content": "<s>", "lstrip": False}}, [1], []),
        ({"post_processor": None}, {"bos_token": "REMOVED"}, [1], []),  # special_tokens_map.json has it
        ({}, {"add_bos_token": False}, [], []),
        ({}, {"add_eos_token": True, "add_bos_token": False}, [], [2]),
        ({"post_processor": None}, {"tokenizer_class": "PreTrainedTokenizerFast"}, [1], []),
    ],
)
def test_begin_and_end_by_the_settings_beside_the_file(
    llama: Path, file: dict[str, Any], config: dict[str, Any], begin: list[int], end: list[int]
) -> None:
    """As transformers' LlamaTokenizerFast, which asks tokenizer_config.json whatever tokenizer.json says."""
    edited(llama / "tokenizer.json", **file)
    edited(llama / "tokenizer_config.json", **config)
    assert opened(llama)("close the drawer").tolist() == [*begin, *IDS, *end, 29871]


def test_rules_of_the_file_for_length_change_nothing(llama: Path) -> None:
    cut = {"direction": "Left", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0}
    for changes in ({}, {"post_processor": None}):
        edited(llama / "tokenizer.json", truncation=cut, padding={**pad, "pad_token": "</s>"}, **changes)
        assert opened(llama)("close the drawer").tolist() == [1, *IDS, 29871]


def test_added_tokens_of_the_settings(llama: Path) -> None:
    kept = json.loads((llama / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    edited(llama / "tokenizer.json", added_tokens=[token for token in kept if token["id"] < 32000])
    (llama / "added_tokens.json").write_text('{"<grasp>": 32001}')
    tokenizers.write(llama / "tokenizer.json", llama / "written.json")
    written = Tokenizer.from_file(str(llama / "written.json"))  # what artifacts keep
    assert written.token_to_id("<PAD>") == 32000
    assert written.encode("the <grasp>").ids[-1] == 32001
    (llama / "added_tokens.json").write_text('{"<grasp>": 32007}')
    with pytest.raises(UserError, match=r"added token '<grasp>' to be 32007, .* found 32001 in .*tokenizer.json"):
        tokenizers.write(llama / "tokenizer.json", llama / "written.json")


def test_added_tokens_of_a_sentencepiece_model(tmp_path: Path) -> None:
    shutil.copy(MODELS / "llama.model", tmp_path / "tokenizer.model")
    size = len(tokenizers.parse(tmp_path / "tokenizer.model").pieces)
    added = {str(size): {"content": "<PAD>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "add_eos_token": True}))
    tokens = tokenizers.convert(tmp_path / "tokenizer.model").encode("close<PAD>").tokens
    assert (tokens[0], tokens[-2:]) == ("<s>", ["<PAD>", "</s>"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<begin>"}, "expected bos_token, which tokenizer_config.json asks for, among the tokens"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, "expected a tokenizer without bos"),
    ],
)
def test_settings_that_contradict_the_file(llama: Path, config: dict[str, Any], message: str) -> None:
    if "bos_token" in config:
        edited(llama / "tokenizer.json", post_processor=None)
    edited(llama / "tokenizer_config.json", **config)
    with pytest.raises(UserError, match=message) as caught:
        opened(llama)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_broken_settings_are_not_none(llama: Path, file: str) -> None:
    (llama / file).write_text('{"add_bos_token": tru')
    with pytest.raises(UserError, match=f"expected JSON in .*{file}, found: .*; copy that file again"):
        opened(llama)


def test_a_prompt_needs_its_begin_token(llama: Path, tmp_path: Path) -> None:
    edited(llama / "tokenizer.json", post_processor=None)
    (llama / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"begin with <s>, as openvla's do, found that .*tokenizer.json adds nothing"):
        opened(llama)
    gemma = shutil.copytree(DATA / "pi05/tokenizer", tmp_path / "gemma")
    edited(gemma / "tokenizer.json", post_processor=None)
    with pytest.raises(UserError, match=r"begin with <bos>, as pi05's do"):
        opened(gemma, "pi05")
    edited(gemma / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    assert opened(gemma, "pi05")("close it", np.zeros(5, np.float32))[0] == 2


def test_long_prompts_are_cut_at_their_end(tmp_path: Path) -> None:
    gemma = shutil.copytree(DATA / "pi0/tokenizer", tmp_path / "gemma")
    edited(gemma / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(UserError, match="truncation_side right"):
        opened(gemma, "pi0")


@pytest.mark.parametrize("rows", [300, 29871])
def test_a_token_that_the_embedding_has_no_row_of(rows: int) -> None:
    """Of a tokenizer with more words, or an added token in the instruction: refused before anything is computed."""
    folder = open_folder(DATA / "openvla/checkpoint")
    options = ReadOptions(official.read_hints(DATA / "openvla/golden.json"))
    spec = reader.layout(folder, options).spec
    small = replace(spec, geometry={**spec.geometry, "vocabulary": rows})
    observation = {"image.image0": np.zeros((56, 56, 3), np.uint8), "instruction": "close the drawer"}
    with pytest.raises(UserError, match=rf"tokens below {rows}, the rows of the policy's embedding, found token \d+"):
        preprocess.prepare(observation, small, tokenizer_of(folder, options, spec))
    preprocess.prepare(observation, spec, tokenizer_of(folder, options, spec))


def test_an_instruction_with_a_word_beyond_the_embedding(tmp_path: Path) -> None:
    """PaliGemma's tokenizer has an <image> behind the last row."""
    gemma = shutil.copytree(DATA / "pi0/tokenizer", tmp_path / "gemma")
    folder = open_folder(DATA / "pi0/checkpoint")
    rows = folder.tensors.shape("model.paligemma_with_expert.paligemma.lm_head.weight")[0]
    size = Tokenizer.from_file(str(gemma / "tokenizer.json")).get_vocab_size()
    words = {f"<extra{i}>": size + i for i in range(rows - size + 1)}
    (gemma / "added_tokens.json").write_text(json.dumps(words))
    policy = TorchPolicy.from_folder(
        folder, ReadOptions(official.read_hints(DATA / "pi0/golden.json"), tokenizer=gemma)
    )
    observation: dict[str, Any] = {
        f"image.{camera.name}": np.zeros((64, 64, 3), np.uint8) for camera in policy.spec.cameras
    }
    observation |= {"state": state(policy.spec), "instruction": f"take <extra{rows - size}>"}
    with pytest.raises(UserError, match=rf"tokens below {rows}, .* found token {rows} "):
        policy.infer(observation)
