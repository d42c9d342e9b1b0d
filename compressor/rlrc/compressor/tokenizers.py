"""The tokenizer of an official folder as one ``tokenizers`` file: tokenizer.json, or a sentencepiece model converted.

Offline always. A sentencepiece model is a protocol buffer (sentencepiece_model.proto); the few fields needed are read
here, so that the sentencepiece package is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.official import Folder, Options

JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
BLANK = "\u2581"  # sentencepiece's visible blank

# sentencepiece_model.proto: ModelProto.SentencePiece.Type and TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Sentencepiece:
    pieces: list[tuple[str, float, int]]  # text, score, type
    algorithm: int
    bos: int
    eos: int
    byte_fallback: bool
    characters: bytes  # normalisation rules, compiled; empty: none
    add_prefix: bool  # a blank before the text
    collapse: bool  # several blanks are one, none at the ends


def of_folder(folder: Folder, options: Options) -> Path:
    """The tokenizer's file: what the options name, or it is in the folder, or where the hints or the processors say.

    Raises UserError if there is none.
    """
    named = [name for name in (folder.config.get("vlm_model_name"), _processor(folder)) if isinstance(name, str)]
    places = [folder.path, *[Path(str(hint)) for hint in [options.hints.get("tokenizer")] if hint]]
    # A policy trained with a local copy names its folder, which may have moved together with the checkpoint.
    places += [place for name in named for place in (Path(name), folder.path.parent / name)]
    if options.tokenizer is not None:
        places = [options.tokenizer]
    for place in places:
        for file in (place, place / JSON, place / SENTENCEPIECE):
            if file.is_file():
                return file
    of = f" (it is that of {named[-1]})" if named else ""
    raise UserError(
        f"expected {JSON} or {SENTENCEPIECE} in {places[0]}, found neither; give the tokenizer{of} as --tokenizer PATH"
    )


def _processor(folder: Folder) -> object:
    """The tokenizer's name in lerobot's folders."""
    try:
        steps = folder.json("policy_preprocessor.json")["steps"]
        return next(s["config"].get("tokenizer_name") for s in steps if s.get("registry_name") == "tokenizer_processor")
    except (UserError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def write(source: Path, target: Path) -> None:
    """Writes what ``of_folder`` found as a ``tokenizers`` file. Raises UserError for a file that is neither kind."""
    if source.suffix == ".json":
        shutil.copyfile(source, target)
    else:
        convert(source).save(str(target))


def convert(path: Path) -> Tokenizer:
    """A sentencepiece model as a Tokenizer, with the begin and end tokens that tokenizer_config.json asks for.

    Without that file the text begins with <s> (or <bos>) and does not end with </s>, as for Llama and Gemma.
    """
    model = parse(path)
    pieces = model.pieces
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None or len(vocabulary) != len(pieces):
        raise UserError(f"expected different pieces, one for unknown text, in {path}, found others; copy it again")
    if model.algorithm == BPE:
        unk_token = pieces[unknown][0]
        merges = sorted_merges(pieces)
        tokenizer = Tokenizer(
            models.BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=model.byte_fallback)
        )
    elif model.algorithm == UNIGRAM:
        scored = [(text, score) for text, score, _ in pieces]
        tokenizer = Tokenizer(models.Unigram(scored, unknown, model.byte_fallback))
    else:
        raise UserError(f"expected a BPE or unigram model in {path}, found model type {model.algorithm}; convert it")

    steps: list[normalizers.Normalizer] = []
    if model.characters:
        steps.append(normalizers.Precompiled(model.characters))
    if model.collapse:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_prefix:
        steps.append(normalizers.Prepend(BLANK))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            # Matched in the normalised text, where a blank is visible; but there a prefix would become part of them.
            AddedToken(text, normalized=kind == USER_DEFINED and not model.add_prefix, special=kind != USER_DEFINED)
            for text, _, kind in pieces
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    begin, end = _ends(path, model)
    if begin or end:
        single = [*begin, "$A", *end]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(text, vocabulary[text]) for text in (*begin, *end)]
        )
    return tokenizer


def sorted_merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union has the best score; so every way to split a piece is a merge."""
    ranks = {text: index for index, (text, _, kind) in enumerate(pieces) if kind in (NORMAL, UNUSED)}
    merges = [
        (-score, ranks[text[:cut]], ranks[text[cut:]], text, cut)
        for text, score, kind in pieces
        if kind == NORMAL
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    ]
    return [(text[:cut], text[cut:]) for *_, text, cut in sorted(merges)]


def _ends(path: Path, model: Sentencepiece) -> tuple[list[str], list[str]]:
    try:
        config = json.loads((path.parent / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    wanted = ((model.bos, config.get("add_bos_token", True)), (model.eos, config.get("add_eos_token", False)))
    begin, end = ([model.pieces[i][0]] if asked and 0 <= i < len(model.pieces) else [] for i, asked in wanted)
    return begin, end


def parse(path: Path) -> Sentencepiece:
    """Raises UserError for a file that is no sentencepiece model."""
    try:
        model = list(fields(path.read_bytes()))
        trainer, normalizer = (
            dict(fields(next((value for number, value in model if number == wanted), b""))) for wanted in (2, 3)
        )
        pieces = []
        for number, value in model:
            if number == 1:
                piece = dict(fields(value))
                score = unpack_from("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        if not pieces:
            raise ValueError("no pieces")
        return Sentencepiece(
            pieces,
            algorithm=trainer.get(3, UNIGRAM),
            bos=_signed(trainer.get(41, 1)),
            eos=_signed(trainer.get(42, 2)),
            byte_fallback=bool(trainer.get(35, False)),
            characters=normalizer.get(2, b""),
            add_prefix=bool(normalizer.get(3, True)),
            collapse=bool(normalizer.get(4, True)),
        )
    except OSError as error:
        raise UserError(f"expected {path}, found: {error.strerror}; copy that file again") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StructError) as error:
        raise UserError(f"expected a sentencepiece model in {path}, found: {error!r}; copy that file again") from None


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: varints as integers, everything else as its bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        length = {1: 8, 5: 4}.get(wire) or varint()
        if position + length > len(message):
            raise ValueError("the end in the middle")
        yield number, message[position : position + length]
        position += length


def _signed(value: int) -> int:
    """Negative numbers are stored as 64-bit two's complement."""
    return value - (1 << 64) if value >> 63 else value
