"""The tokenizer of a foreign text tower: its file, padding, context length and cleaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_export.model_files import MAX_JSON, read_json
from crl_sdk.errors import ExportError
from crl_sdk.model._tokenizer import Clean, Tokenizer

LONGEST = 128
"""Largest context length that is chosen without --context-length. Every text is filled up to it,
and criteria are short; multilingual towers read up to 8,192 tokens."""

_UNLIMITED = 1_000_000
"""Lengths above this mean no limit: transformers writes 1e30."""

LARGEST = 32_768
"""Largest context length. Every text is filled up to it."""

_DEFAULT_LENGTHS = {"clip": 77, "siglip": 64, "siglip2": 64}
"""Context lengths of models whose configuration leaves out what is transformers' default."""

FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How texts become token ids.

    Attributes:
        path: File of the `tokenizers` library.
        context_length: Number of tokens per text.
        pad_id: Token id that fills the rest of a row.
        clean: How texts are cleaned first.
        pad_ends_texts: Whether that token is also the last one of each text.
        vocabulary: One more than the largest token id.
    """

    path: Path
    context_length: int
    pad_id: int
    clean: Clean
    pad_ends_texts: bool
    vocabulary: int


def text_settings(
    directory: Path | None,
    config: dict[str, Any],
    *,
    fixed_length: int | None,
    clean: Clean,
    tokenizer: Path | None = None,
    context_length: int | None = None,
    pad_id: int | None = None,
    out: Path,
) -> TextSettings:
    """Find the tokenizer of a text tower and write it without padding and truncation.

    Args:
        directory: Directory with `tokenizer.json` and `tokenizer_config.json`.
        config: Content of `config.json`.
        fixed_length: Number of tokens that the tower takes, if it is fixed.
        clean: How texts are cleaned first.
        tokenizer: `tokenizer.json`, or a directory with it, in place of `directory`.
        context_length: Number of tokens per text, if it is given.
        pad_id: Token id that fills rows, if it is given.
        out: Path of the file to write.

    Raises:
        ExportError: If there is no tokenizer, or one of the settings is not known.
    """
    directory, path = _find(directory, tokenizer)
    from tokenizers import Tokenizer as FastTokenizer

    try:
        if path.stat().st_size > MAX_JSON:
            raise ExportError(f"{path}: larger than {MAX_JSON >> 20} MiB; this is not a tokenizer")
        path.open("rb").close()  # the library says nothing about the reason
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ExportError(
            f"{path}: expected a file of the `tokenizers` library ({error}); get it again"
        ) from error
    settings = read_json(directory / "tokenizer_config.json")
    length = _given_length(fixed_length, context_length) or _context_length(
        path, fast, settings, config
    )
    if not 2 <= length <= LARGEST:
        raise ExportError(
            f"{path}: a context length of {length:,}, expected 2 to {LARGEST:,}; pass "
            "--context-length"
        )
    pad = pad_id if pad_id is not None else _pad_id(directory, fast, settings, config)
    fast.no_padding()
    fast.no_truncation()
    out.write_bytes(fast.to_str(pretty=True).encode())  # `save` raises bare Exception
    last = fast.encode("a photo").ids[-1]
    return TextSettings(
        path=out,
        context_length=length,
        pad_id=pad,
        clean=clean,
        pad_ends_texts=last == pad,
        vocabulary=max(fast.get_vocab(with_added_tokens=True).values()) + 1,
    )


def lengths_of(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[int]:
    """Return the number of tokens of each text, at most the context length."""
    return [min(n, tokenizer.context_length) for n in tokenizer.count(texts)]


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `config.json` about the text tower."""
    found = (config.get(key) for key in ("text_config", "text_cfg"))
    return next((each for each in found if isinstance(each, dict)), config)


def _find(directory: Path | None, tokenizer: Path | None) -> tuple[Path, Path]:
    if tokenizer is not None:
        path = tokenizer / FILE if tokenizer.is_dir() else tokenizer
        if not path.is_file():
            raise ExportError(f"{path}: no such file; check --tokenizer")
        return path.parent, path
    where = directory if directory is not None else Path()
    path = where / FILE
    if directory is None or not path.is_file():
        raise ExportError(
            f"{where}: has no {FILE}, which the text tower needs: pass --tokenizer FILE of the "
            "same model (for OpenAI's CLIP and most of open_clip, that of "
            "openai/clip-vit-base-patch32), or import the image tower alone with --no-text"
        )
    return directory, path


def _given_length(fixed: int | None, given: int | None) -> int | None:
    if fixed is not None and given not in (None, fixed):
        raise ExportError(
            f"the text tower takes {fixed} tokens, got --context-length {given}; leave it out"
        )
    return fixed or given


def _context_length(path: Path, fast: Any, settings: dict[str, Any], config: dict[str, Any]) -> int:
    text_config = text_part(config)
    truncation = (fast.truncation or {}).get("max_length")
    candidates = (
        text_config.get("max_position_embeddings"),
        text_config.get("context_length"),
        settings.get("model_max_length"),
        truncation,
    )
    limits = [
        int(each) for each in candidates if isinstance(each, int | float) and 0 < each < _UNLIMITED
    ]
    kind = str(text_config.get("model_type") or config.get("model_type") or "")
    if not limits and (default := _DEFAULT_LENGTHS.get(kind.removesuffix("_text_model"))):
        limits = [default]
    if not limits:
        raise ExportError(
            f"{path}: neither config.json nor tokenizer_config.json says how many tokens the text "
            "tower reads; pass --context-length (77 for CLIP, 64 for SigLIP)"
        )
    return min(*limits, LONGEST)


def _pad_id(directory: Path, fast: Any, settings: dict[str, Any], config: dict[str, Any]) -> int:
    special = read_json(directory / "special_tokens_map.json")
    for token in (settings.get("pad_token"), special.get("pad_token")):
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (found := fast.token_to_id(content)) is not None:
            return int(found)
    if fast.padding is not None:
        return int(fast.padding["pad_id"])
    stated = text_part(config).get("pad_token_id")
    if isinstance(stated, int):
        return stated
    raise ExportError(
        f"{directory}: the token that fills short texts is not known; pass --pad-id (0 for "
        "open_clip's CLIP, the id of <|endoftext|> for OpenAI's in transformers)"
    )
