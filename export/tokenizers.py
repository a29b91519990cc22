"""Writes the tokenizers of open_clip as one `tokenizers` file that gives the same ids.

open_clip's BPE splits a text by one regular expression that contains the start and end tokens. A
special token of `tokenizers` would also match inside a run of punctuation, where open_clip's does
not. Therefore the start and end tokens are built by merges of the lowest rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from crl_sdk.errors import ExportError
from crl_sdk.model._tokenizer import Clean


class TokenizerSettings(NamedTuple):
    """How the ids of a tokenizer fill a row, see `crl_sdk.model.Tokenizer`."""

    context_length: int
    pad_id: int
    clean: Clean


class TextTokenizer(Protocol):
    """The tokenizer of a text tower that is exported."""

    def ids(self, texts: list[str]) -> NDArray[np.int64]:
        """Return the token ids of texts as the model's own library gives them, shape (n, L)."""

    def size(self) -> int:
        """Return one more than the largest token id of ordinary text."""

    def write(self, path: Path) -> TokenizerSettings:
        """Write `tokenizer.json` and return its settings.

        Raises:
            ExportError: If this kind of tokenizer cannot be written.
        """


_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


class OpenClipTokenizer:
    """A tokenizer of open_clip: SimpleTokenizer, or HFTokenizer with a fast backend."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a tokenizer of open_clip."""
        self._tokenizer = tokenizer

    def ids(self, texts: list[str]) -> NDArray[np.int64]:
        """Return the token ids of texts, shape (n, L), int64."""
        rows: NDArray[np.int64] = self._tokenizer(texts).numpy()
        return rows

    def size(self) -> int:
        """Return one more than the largest token id of ordinary text."""
        if isinstance(self._tokenizer, SimpleTokenizer):
            return int(self._tokenizer.vocab_size)
        return vocabulary_size(self._tokenizer.tokenizer)

    def write(self, path: Path) -> TokenizerSettings:
        """Write `tokenizer.json`, see `TextTokenizer.write`."""
        return write_tokenizer(self._tokenizer, path)


def vocabulary_size(tokenizer: Any) -> int:
    """Return one more than the largest token id of a tokenizer of transformers.

    Tokens that were added, such as `<image>`, stand in no ordinary text, and are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return max(backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    return int(tokenizer.vocab_size)


def write_tokenizer(tokenizer: Any, path: Path) -> TokenizerSettings:
    """Write `tokenizer.json`.

    Args:
        tokenizer: Tokenizer of open_clip: SimpleTokenizer, or HFTokenizer with a fast backend.
        path: Path of the file to write.

    Raises:
        ExportError: If this kind of tokenizer cannot be written.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.reduction_fn is not None:
            raise ExportError("a tokenizer that drops tokens at random cannot be exported")
        from_bpe(tokenizer).save(str(path))
        length = int(tokenizer.context_length or 0)
        return TokenizerSettings(length, 0, _clean_name(tokenizer.clean_fn))
    if isinstance(tokenizer, HFTokenizer) and hasattr(tokenizer.tokenizer, "backend_tokenizer"):
        if tokenizer.tokenizer_mode or tokenizer.strip_sep_token:
            raise ExportError(
                f"HFTokenizer in mode {tokenizer.tokenizer_mode!r} cannot be exported: "
                "export the image tower alone with --no-text"
            )
        fast = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
        fast.no_padding()
        fast.no_truncation()
        fast.save(str(path))
        pad_id = int(tokenizer.tokenizer.pad_token_id or 0)
        length = int(tokenizer.context_length or 0)
        return TokenizerSettings(length, pad_id, _clean_name(tokenizer.clean_fn))
    raise ExportError(
        f"expected open_clip's SimpleTokenizer or a fast HFTokenizer, got "
        f"{type(tokenizer).__name__}: export the image tower alone with --no-text"
    )


def from_bpe(tokenizer: SimpleTokenizer) -> Tokenizer:
    """Return a fast tokenizer that adds start and end tokens, and neither pads nor truncates."""
    specials = [tokenizer.decoder[i] for i in tokenizer.all_special_ids]
    vocabulary = {token: i for token, i in tokenizer.encoder.items() if token not in specials}
    merges = sorted(tokenizer.bpe_ranks, key=lambda pair: tokenizer.bpe_ranks[pair])
    for special in specials:
        built, *rest = _pieces(tokenizer, special)
        for piece in rest:
            merges.append((built, piece))
            built += piece
            # the last merge gives the special token; no other text leads to those before it
            final = built == special + _END_OF_WORD
            new_id = tokenizer.encoder[special] if final else tokenizer.vocab_size + len(vocabulary)
            vocabulary[built] = new_id
    fast = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
    pattern = "(?i)" + "|".join([*specials, _PATTERN])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = specials[:2]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)],
    )
    return fast


def _pieces(tokenizer: SimpleTokenizer, special: str) -> list[str]:
    """Split a special token by the ordinary merges like a word."""
    held = tokenizer.cache.pop(special)
    try:
        return list(tokenizer.bpe(special).split(" "))
    finally:
        tokenizer.cache[special] = held


def _clean_name(clean_fn: Any) -> Clean:
    names: dict[str, Clean] = {
        "_clean_lower": "lower",
        "_clean_whitespace": "whitespace",
        "_clean_canonicalize": "canonicalize",
    }
    name = names.get(getattr(clean_fn, "__name__", ""))
    if name is None:
        raise ExportError(f"unknown text cleaning {clean_fn!r} of the tokenizer")
    return name
