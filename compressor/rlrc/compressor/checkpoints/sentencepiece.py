"""Parses sentencepiece models, which are protocol buffers, without the sentencepiece package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import Any

from rlrc.errors import UserError

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
    characters: bytes  # compiled normalisation rules; empty: none
    add_prefix: bool  # put a blank before the text
    collapse: bool  # merge blanks, and strip the ends


def parse(path: Path) -> Sentencepiece:
    """Reads a model. Raises UserError for a file that is no sentencepiece model."""
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
            bos=_to_signed(trainer.get(41, 1)),
            eos=_to_signed(trainer.get(42, 2)),
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
            raise ValueError("the file ends inside a field")
        yield number, message[position : position + length]
        position += length


def _to_signed(value: int) -> int:
    """Decodes 64-bit two's complement."""
    return value - (1 << 64) if value >> 63 else value
