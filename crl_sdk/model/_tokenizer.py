"""Texts → token ids (n, L), equal to open_clip's own tokenizer for the exported model."""

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

Clean: TypeAlias = Literal["lower", "whitespace", "canonicalize"]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer:
    """A `tokenizers` file with the cleaning, padding and context length of its model."""

    def __init__(
        self, fast: _FastTokenizer, *, context_length: int, pad_id: int, clean: Clean
    ) -> None:
        """Store an already loaded tokenizer; `Tokenizer.open` reads one from a file.

        Args:
            fast: adds the start and end tokens itself; does not pad or truncate.
            context_length: tokens per text, start and end included.
            pad_id: the id that fills the rest of a row.
            clean: open_clip's name of the text cleaning that comes first.
        """
        self._fast = fast
        self.context_length = context_length
        self.pad_id = pad_id
        self.clean: Clean = clean

    @classmethod
    def open(cls, path: Path, *, context_length: int, pad_id: int, clean: Clean) -> Tokenizer:
        """Load `tokenizer.json`; the other arguments are those of the constructor.

        Raises:
            IntegrityError: the file is not a `tokenizers` file.
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
        """Tokenise texts.

        Args:
            texts: n texts, each with at least one visible character.
            truncate: cut texts longer than the context, as open_clip does, instead of refusing.

        Returns:
            (n, context_length) int64.

        Raises:
            InvalidInputError: `texts` is a single string or empty, holds a blank text, something
                that is not text, or a text longer than the context.
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

    def _clean(self, text: str, position: int) -> str:
        if not isinstance(text, str):
            raise InvalidInputError(
                f"text {position}: expected a string, got {type(text).__name__}"
            )
        cleaned = clean_text(text, self.clean)
        if not cleaned:
            raise InvalidInputError(
                f"text {position} has no visible characters ({text[:40]!r}): remove it"
            )
        return cleaned


def clean_text(text: str, clean: Clean) -> str:
    """Clean a text as open_clip does first: repair Unicode, unescape HTML, then `clean`.

    Args:
        text: any string.
        clean: `lower` collapses white space and lower-cases, `whitespace` only collapses,
            `canonicalize` also removes ASCII punctuation (SigLIP).

    Returns:
        The cleaned text; empty if nothing visible was in it.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if clean == "lower" else text
