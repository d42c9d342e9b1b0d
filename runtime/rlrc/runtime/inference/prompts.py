"""From an instruction to token ids, by the artifact's tokenizer and prompt template."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PromptSpec
from rlrc.errors import UserError


class Tokenizer:
    """The policy's tokenizer and template. Needs the tokenizers library.

    Raises UserError for a damaged file, and unless the tokens of ``prompt.known`` have their ids.
    """

    def __init__(self, path: Path, prompt: PromptSpec) -> None:
        from tokenizers import Tokenizer as Tokenizers

        try:
            self._tokenizer = Tokenizers.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"expected a tokenizers file, found {path}: {error}; copy it again from its source"
            ) from None
        self.prompt = prompt
        self._check_vocabulary(path)
        # The file may set padding and truncation; only the prompt's rules count.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if prompt.truncate:
            self._tokenizer.enable_truncation(prompt.max_tokens - len(prompt.suffix))
        self._last: tuple[str, NDArray[np.int64]] | None = None

    def __call__(self, instruction: str, state: NDArray[np.floating] | None = None) -> NDArray[np.int64]:
        """-> ids (max_tokens,), padded on the right, or (L,) if the prompt is not padded.

        ``state`` (S,), normalised, for prompts that contain it. Raises UserError for an instruction that is too long or
        cannot be tokenized.
        """
        text = self.text(instruction, state)
        if self._last is None or self._last[0] != text:  # usually repeated: this saves 10 us or more
            self._last = (text, self._ids(text, instruction))
        ids: NDArray[np.int64] = self._last[1].copy()
        return ids

    def text(self, instruction: str, state: NDArray[np.floating] | None = None) -> str:
        """The prompt before tokenization."""
        for edit in self.prompt.edits:
            if edit == "lower":
                instruction = instruction.lower()
            elif edit == "strip":
                instruction = instruction.strip()
            elif edit == "blanks":
                instruction = instruction.replace("_", " ").replace("\n", " ")
            elif not instruction.endswith("\n"):
                instruction += "\n"
        values = {"{instruction}": instruction}
        if self.prompt.state_bins:
            assert state is not None
            state = np.pad(state, (0, max(self.prompt.state_width - len(state), 0)))
            values["{state}"] = format_bins(state, self.prompt.state_bins)
        # In one pass: an instruction may itself hold "{state}".
        return re.sub(r"\{instruction\}|\{state\}", lambda match: values.get(match[0], match[0]), self.prompt.template)

    def _ids(self, text: str, instruction: str) -> NDArray[np.int64]:
        prompt = self.prompt
        try:
            ids = self._tokenizer.encode(text).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"expected an instruction of known words, found {instruction!r}: {error}; reword it"
            ) from None
        if prompt.suffix and tuple(ids[-len(prompt.suffix) :]) != prompt.suffix:
            ids += prompt.suffix
        if len(ids) > prompt.max_tokens:
            raise UserError(
                f"expected an instruction of at most {prompt.max_tokens} tokens with its template, "
                f"found {len(ids)} in {instruction!r}; shorten it"
            )
        if prompt.pad_id is None:
            return np.array(ids, np.int64)
        padded = np.full(prompt.max_tokens, prompt.pad_id, np.int64)
        padded[: len(ids)] = ids
        return padded

    def _check_vocabulary(self, path: Path) -> None:
        for piece, number in self.prompt.known.items():
            if (found := self._tokenizer.token_to_id(piece)) != number:
                raise UserError(
                    f"expected the piece {piece!r} to be token {number} in {path}, found "
                    f"{'no such piece' if found is None else found}; "
                    "use the tokenizer that the policy was trained with"
                )


def format_bins(state: NDArray[np.floating], bins: int) -> str:
    """A normalised state as the numbers of its bins over [-1, 1], with -1 for values below (pi0.5's prompt)."""
    edges = np.linspace(-1, 1, bins + 1)[:-1]
    return " ".join(map(str, (np.digitize(state, edges) - 1).tolist()))
