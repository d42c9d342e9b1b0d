"""A checkpoint folder's tokenizer as one ``tokenizers`` file: tokenizer.json, or a converted sentencepiece model.

Never downloads. transformers applies the settings next to a tokenizer.json (begin and end tokens, added tokens), so the
file alone may yield other ids than in training. This module applies the same settings.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints.sentencepiece import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    parse,
)
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions

JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
BEGIN = {
    "openvla": "<s>",
    "openvla-oft": "<s>",
    "pi0": "<bos>",
    "pi05": "<bos>",
}  # families whose prompts have a begin token
BLANK = "\u2581"  # sentencepiece's visible blank


def of_folder(folder: Folder, options: ReadOptions) -> Path:
    """The tokenizer's file: the path in the options, else in the folder, else the path in the hints or processors.

    Raises UserError if there is none.
    """
    named = [name for name in (folder.config.get("vlm_model_name"), _processor(folder)) if isinstance(name, str)]
    places = [folder.path, *[Path(str(hint)) for hint in [options.hints.get("tokenizer")] if hint]]
    # A policy trained with a local tokenizer names its folder, which may have moved with the checkpoint.
    places += [place for name in named for place in (Path(name), folder.path.parent / name)]
    if options.tokenizer is not None:
        places = [options.tokenizer]
    for place in places:
        for file in (place, place / JSON, place / SENTENCEPIECE):
            if file.is_file():
                return file
    of = f" (it is that of {named[-1]})" if named else ""
    raise UserError(
        f"expected {JSON} or {SENTENCEPIECE} in {places[0]}, found neither; pass the tokenizer{of} as --tokenizer PATH"
    )


def _processor(folder: Folder) -> object:
    """The tokenizer's name in lerobot's folders."""
    try:
        steps = folder.json("policy_preprocessor.json")["steps"]
        return next(s["config"].get("tokenizer_name") for s in steps if s.get("registry_name") == "tokenizer_processor")
    except (UserError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def write(source: Path, target: Path, spec: PolicySpec | None = None) -> None:
    """Writes the file that ``of_folder`` found as a ``tokenizers`` file; copies it if it is complete.

    Raises UserError for a file of another kind, and as ``complete`` and ``check``.
    """
    settings = settings_of(source)
    if source.suffix == ".json":
        tokenizer = _load(source)
        changed = complete(tokenizer, settings, source)
    else:
        tokenizer, changed = convert(source), True
    if spec is not None:
        check(tokenizer, settings, source, spec)
    if changed:
        tokenizer.save(str(target))
    else:
        shutil.copyfile(source, target)


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"expected a tokenizers file, found {path}: {error}; copy it again from its source") from None
    # The policy's PromptSpec governs these.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of tokenizer_config.json, which override tokenizer.json (transformers' tokenization_utils_fast.py).

    ``begin``, ``end``: whether a text gets these tokens (None: not stated); ``tokens``: their text by "bos" and "eos";
    ``added``: tokens by id; ``left``: truncate long prompts at their beginning.
    """

    begin: bool | None = None
    end: bool | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    added: dict[int, AddedToken] = field(default_factory=dict)
    left: bool = False
    rules: bool = False  # the tokenizer's class takes begin and end from here, not from tokenizer.json


def settings_of(source: Path) -> TokenizerSettings:
    """The settings in the files next to the tokenizer; the defaults without them."""
    config = _object(source.parent / "tokenizer_config.json")
    special = _object(source.parent / "special_tokens_map.json") | config
    texts = {name: _text(special.get(f"{name}_token")) for name in ("bos", "eos")}
    listed = config.get("added_tokens_decoder")
    added = {
        int(index): AddedToken(
            token["content"],
            **{key: bool(token.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")},
        )
        for index, token in (listed.items() if isinstance(listed, dict) else ())
        if index.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    more = _object(source.parent / "added_tokens.json")
    known = {token.content for token in added.values()}
    added |= {i: AddedToken(text, normalized=False) for text, i in more.items() if type(i) is int and text not in known}
    kind = str(config.get("tokenizer_class"))
    rules = any(family in kind for family in ("Llama", "Gemma"))  # whose defaults are True and False
    begin, end = (config.get(f"add_{name}_token") for name in ("bos", "eos"))
    return TokenizerSettings(
        begin if isinstance(begin, bool) else True if rules else None,
        end if isinstance(end, bool) else False if rules else None,
        {name: text for name, text in texts.items() if text},
        dict(sorted(added.items())),
        config.get("truncation_side") == "left",
        rules,
    )


def _object(path: Path) -> dict[str, Any]:
    """The values of a JSON file, empty if it is missing. Raises UserError for a broken file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"expected {path}, found: {error.strerror}; make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found: {error}; copy that file again") from None
    return values if isinstance(values, dict) else {}


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def complete(tokenizer: Tokenizer, settings: TokenizerSettings, path: Path) -> bool:
    """Adds the settings that the tokenizer lacks, and returns whether there were any.

    Raises UserError where settings and tokenizer contradict each other.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = {index: token for index, token in settings.added.items() if token.content not in added}
    tokenizer.add_tokens(list(missing.values()))
    for index, token in settings.added.items():
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise UserError(
                f"expected the added token {token.content!r} to be {index}, as tokenizer_config.json says, found "
                f"{found} in {path}; copy both from one tokenizer"
            )
    return _set_ends(tokenizer, settings, path) or bool(missing)


def _set_ends(tokenizer: Tokenizer, settings: TokenizerSettings, path: Path) -> bool:
    now = ends(tokenizer)
    wanted = list(now)
    for place, (name, asked) in enumerate((("bos", settings.begin), ("eos", settings.end))):
        token = tokenizer.token_to_id(settings.tokens[name]) if name in settings.tokens else None
        if asked is None or bool(now[place]) == asked:
            continue
        if asked and token is None:
            raise UserError(
                f"expected {name}_token, which tokenizer_config.json asks for, among the tokens of {path}, found none; "
                "copy both from one tokenizer"
            )
        if not asked and not settings.rules:
            raise UserError(
                f"expected a tokenizer without {name}_token, as tokenizer_config.json says, found one that "
                f"{path} adds; copy both from one tokenizer"
            )
        wanted[place] = (token,) if asked and token is not None else ()
    if tuple(wanted) == now:
        return False
    begin, end = ([str(tokenizer.id_to_token(i)) for i in ids] for ids in wanted)
    used = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys((*begin, *end))]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=used)
    return True


def ends(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def check(tokenizer: Tokenizer, settings: TokenizerSettings, source: Path, spec: PolicySpec) -> None:
    """Raises UserError if the family's begin token is missing without a setting, and for truncation on the left."""
    begin = BEGIN.get(spec.family)
    if begin is not None and settings.begin is None and not ends(tokenizer)[0]:
        raise UserError(
            f"expected prompts that begin with {begin}, as {spec.family}'s do, found that {source} adds nothing; copy "
            "its tokenizer_config.json next to it"
        )
    if settings.left and spec.prompt is not None and spec.prompt.truncate:
        raise UserError(
            f"expected truncation_side right in the tokenizer_config.json next to {source}, found left; rlrc "
            "truncates long prompts at their end"
        )


def convert(path: Path) -> Tokenizer:
    """Converts a sentencepiece model to a Tokenizer with the tokens of tokenizer_config.json.

    Without that file the text begins with <s> (or <bos>) and does not end with </s>, as for Llama and Gemma.
    """
    model, settings = parse(path), settings_of(path)
    pieces = model.pieces
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None or len(vocabulary) != len(pieces):
        raise UserError(f"expected different pieces, one for unknown text, in {path}, found others; copy it again")
    if model.algorithm == BPE:
        unk_token = pieces[unknown][0]
        merges = sort_merges(pieces)
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
            # Match them in the normalised text, where blanks are visible, unless a prefix would become part of them.
            AddedToken(text, normalized=kind == USER_DEFINED and not model.add_prefix, special=kind != USER_DEFINED)
            for text, _, kind in pieces
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    own = {name: pieces[i][0] for name, i in (("bos", model.bos), ("eos", model.eos)) if 0 <= i < len(pieces)}
    begin = bool(own.get("bos")) if settings.begin is None else settings.begin
    complete(tokenizer, replace(settings, begin=begin, end=bool(settings.end), tokens=own | settings.tokens), path)
    return tokenizer


def sort_merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every split of a piece in two, by score: sentencepiece merges the neighbours whose union has the best score."""
    ranks = {text: index for index, (text, _, kind) in enumerate(pieces) if kind in (NORMAL, UNUSED)}
    merges = [
        (-score, ranks[text[:cut]], ranks[text[cut:]], text, cut)
        for text, score, kind in pieces
        if kind == NORMAL
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    ]
    return [(text[:cut], text[cut:]) for *_, text, cut in sorted(merges)]
