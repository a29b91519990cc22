"""Writes the tokenizers of transformers as one `tokenizers` file that gives the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from crl_export.hugging_face.models import import_transformers, quiet
from crl_export.imported.texts import FILE, LONGEST
from crl_export.tokenizers import TokenizerSettings
from crl_sdk.errors import ExportError
from crl_sdk.model import _parity as parity
from crl_sdk.model._tokenizer import Tokenizer

_UNLIMITED = 1_000_000
"""Lengths above this mean no limit: transformers writes 1e30."""


class HuggingFaceTokenizer:
    """The tokenizer of a directory in the format of Hugging Face."""

    def __init__(
        self, directory: Path, *, positions: int | None, context_length: int | None = None
    ) -> None:
        """Load a tokenizer.

        Args:
            directory: Directory with its files.
            positions: Number of positions of the text tower, if it is known.
            context_length: Number of tokens per text, if it is given.

        Raises:
            ExportError: If it cannot be loaded, or the context length is not known.
        """
        self.directory = directory
        transformers = import_transformers()
        with quiet():
            try:
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # transformers and tokenizers raise many types
                raise ExportError(
                    f"{directory}: transformers cannot load its tokenizer ({type(error).__name__}: "
                    f"{str(error)[:300]}); expected tokenizer.json and tokenizer_config.json, or "
                    "export the image tower alone with --no-text"
                ) from error
        self.context_length = self._length(positions, context_length)
        if self._tokenizer.pad_token_id is None:
            raise ExportError(f"{directory}: its tokenizer has no token that fills short texts")
        self.pad_id = int(self._tokenizer.pad_token_id)

    def ids(self, texts: list[str]) -> NDArray[np.int64]:
        """Return the token ids that transformers gives, shape (n, context_length), int64."""
        with quiet():
            rows = self._tokenizer(
                texts,
                padding="max_length",
                max_length=self.context_length,
                truncation=True,
                return_tensors="np",
            )["input_ids"]
        return np.asarray(rows, np.int64)

    def write(self, path: Path) -> TokenizerSettings:
        """Write `tokenizer.json`.

        Raises:
            ExportError: If no file of the `tokenizers` library gives the ids of transformers.
        """
        texts = list(parity.TEXTS)
        expected = self.ids(texts)
        settings = TokenizerSettings(self.context_length, self.pad_id, "none")
        for fast in self._candidates():
            fast.no_padding()
            fast.no_truncation()
            tokenizer = Tokenizer(fast, **settings._asdict())
            if np.array_equal(tokenizer.encode(texts, truncate=True), expected):
                fast.save(str(path))
                return settings
        raise ExportError(
            f"{self.directory}: its tokenizer, {type(self._tokenizer).__name__}, cannot be written "
            "as a file of the `tokenizers` library with the same ids; export the image tower alone "
            "with --no-text"
        )

    def _candidates(self) -> Iterator[FastTokenizer]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if isinstance(backend, FastTokenizer):
            yield FastTokenizer.from_str(backend.to_str())
        if (self.directory / FILE).is_file():
            yield FastTokenizer.from_file(str(self.directory / FILE))

    def _length(self, positions: int | None, given: int | None) -> int:
        if given is not None:
            if positions is not None and given > positions:
                raise ExportError(
                    f"the text tower reads {positions} tokens, got --context-length {given}"
                )
            return given
        limits = [positions, self._tokenizer.model_max_length]
        known = [int(each) for each in limits if each is not None and 0 < each < _UNLIMITED]
        if not known:
            raise ExportError(
                f"{self.directory}: its files do not say how many tokens the text tower reads; "
                "pass --context-length (77 for CLIP, 64 for SigLIP)"
            )
        return min(*known, LONGEST)
