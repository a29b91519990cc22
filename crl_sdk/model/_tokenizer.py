"""Convert texts to token ids, exactly as open_clip's tokenizer of the exported model does."""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _FastTokenizer

Clean: TypeAlias = Literal["lower", "whitespace", "canonicalize", "none"]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer:
    """The tokenizer of a model, with its cleaning, padding and context length."""

    def __init__(
        self, fast: _FastTokenizer, *, context_length: int, pad_id: int, clean: Clean
    ) -> None:
        """Store a loaded tokenizer. `Tokenizer.open` reads one from a file.

        Args:
            fast: Tokenizer that adds start and end tokens, and neither pads nor truncates.
            context_length: Number of tokens per text, start and end included.
            pad_id: Token id that fills the rest of a row.
            clean: Cleaning applied to texts first, see `clean_text`.
        """
        self._fast = fast
        self.context_length = context_length
        self.pad_id = pad_id
        self.clean: Clean = clean

    @classmethod
    def open(cls, path: Path, *, context_length: int, pad_id: int, clean: Clean) -> Tokenizer:
        """Load a tokenizer from a file.

        Args:
            path: Path of `tokenizer.json`.
            context_length: Number of tokens per text, start and end included.
            pad_id: Token id that fills the rest of a row.
            clean: Cleaning applied to texts first, see `clean_text`.

        Raises:
            IntegrityError: If the file is not a file of the `tokenizers` library.
        """
        from tokenizers import Tokenizer as FastTokenizer

        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise IntegrityError(
                f"{path}: expected a file of the `tokenizers` library ({error}); "
                "export the model again"
            ) from error
        return cls(fast, context_length=context_length, pad_id=pad_id, clean=clean)

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int64]:
        """Return the token ids of texts.

        Args:
            texts: The n texts, each with at least one visible character.
            truncate: Whether to cut texts that are longer than the context, as open_clip does.
                Otherwise they are refused.

        Returns:
            Token ids, shape (n, context_length), int64.

        Raises:
            InvalidInputError: If `texts` is a single string or empty, or an item is blank, not a
                string or longer than the context.
        """
        if isinstance(texts, str):
            raise InvalidInputError(
                f"expected a list of texts, got one string: pass [{texts[:40]!r}]"
            )
        if len(texts) == 0:
            raise InvalidInputError("expected at least one text, got an empty list")
        cleaned = [self._clean(text, position) for position, text in enumerate(texts)]
        ids = np.full((len(texts), self.context_length), self.pad_id, dtype=np.int64)
        for row, encoding in enumerate(self._fast.encode_batch(cleaned)):
            tokens = encoding.ids
            if len(tokens) > self.context_length:
                if not truncate:
                    raise InvalidInputError(
                        f"text {row} has {len(tokens)} tokens, the model reads "
                        f"{self.context_length}: shorten {texts[row][:60]!r}…, "
                        "or pass truncate=True"
                    )
                tokens = [*tokens[: self.context_length - 1], tokens[-1]]
            ids[row, : len(tokens)] = tokens
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, start and end included, without padding."""
        cleaned = [self._clean(text, position) for position, text in enumerate(texts)]
        return [len(encoding.ids) for encoding in self._fast.encode_batch(cleaned)]

    def _clean(self, text: str, position: int) -> str:
        if not isinstance(text, str):
            raise InvalidInputError(
                f"text {position}: expected a string, got {type(text).__name__}"
            )
        cleaned = clean_text(text, self.clean)
        if not cleaned.strip():
            raise InvalidInputError(
                f"text {position} has no visible characters ({text[:40]!r}): remove it"
            )
        return cleaned


def clean_text(text: str, clean: Clean) -> str:
    """Clean a text as open_clip does: repair Unicode, unescape HTML, then apply `clean`.

    Args:
        text: Any string.
        clean: `whitespace` collapses white space. `lower` also converts to lower case.
            `canonicalize` also removes ASCII punctuation (SigLIP). `none` returns the text as it
            is, for tokenizers that clean texts themselves.

    Returns:
        The cleaned text; empty if the text has no visible character.

    Example:
        >>> clean_text(" A  Red   CAT ", "lower")
        'a red cat'
    """
    if clean == "none":
        return text
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if clean == "lower" else text
