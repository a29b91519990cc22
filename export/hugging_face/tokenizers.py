"""Writes the tokenizers of transformers as one `tokenizers` file that gives the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers

from crl_export.hugging_face.models import import_transformers, quiet
from crl_export.hugging_face.siglip_tokenizer import siglip_as_fast
from crl_export.imported.texts import FILE, LONGEST
from crl_export.tokenizers import TokenizerSettings, vocabulary_size
from crl_sdk.errors import ExportError
from crl_sdk.model import _parity as parity
from crl_sdk.model._tokenizer import Tokenizer

_UNLIMITED = 1_000_000
"""Lengths above this mean no limit: transformers writes 1e30."""

VOCABULARIES = (
    FILE, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
"""Files with the vocabulary of a tokenizer."""

_UNUSUAL = (
    "  Leading,  double and trailing spaces  ", "!!! - punctuation: (a_b) <c> & 'd'",
    "&amp; &lt;i&gt; STRASSE Straße İstanbul ΣΊΣΥΦΟΣ",
    "e\u0301 \ufb01ne ½ \uff21\uff14 … “quoted” naïve", "一只猫 사과 красная قطة",
    "👩\u200d👩\u200d👧 \u200b\u00ad\ufeff", "tab\tline\nbreak\u00a0\u3000",
    "x" * 300, "word " * 300, "<s> </s> <pad> <unk> <eos> [PAD] [SEP] <|endoftext|>",
)  # fmt: skip
"""Texts that tokenizers read differently. Of several files that have the right ids for ordinary
texts, the one with the right ids for most of these is written."""


class HuggingFaceTokenizer:
    """The tokenizer of a directory in the format of Hugging Face."""

    def __init__(
        self,
        directory: Path,
        *,
        positions: int | None,
        context_length: int | None = None,
        lower_case: bool = False,
    ) -> None:
        """Load a tokenizer.

        Args:
            directory: Directory with its files.
            positions: Number of tokens that the text tower reads, if it is known.
            context_length: Number of tokens per text, if it is given.
            lower_case: Whether texts are put in lower case first, if the tokenizer is Gemma's.

        Raises:
            ExportError: If it cannot be loaded, or the context length is not known.
        """
        self.directory = directory
        if not any((directory / name).is_file() for name in VOCABULARIES):
            # transformers 5 would make an empty tokenizer
            raise ExportError(
                f"{directory}: has no tokenizer; expected one of {', '.join(VOCABULARIES)}: "
                "download it, or export the image tower alone with --no-text"
            )
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
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        gemma = type(self._tokenizer).__name__.startswith("Gemma")
        self._lower_case = normalizers.Lowercase() if lower_case and gemma else None

    @property
    def end_id(self) -> int:
        """The last token id of a text."""
        with quiet():
            return int(self._tokenizer("a photo")["input_ids"][-1])

    def ids(self, texts: list[str]) -> NDArray[np.int64]:
        """Return the token ids that transformers gives, shape (n, context_length), int64."""
        if self._lower_case is not None:
            texts = [self._lower_case.normalize_str(text) for text in texts]
        with quiet():
            rows = self._tokenizer(
                texts,
                padding="max_length",
                max_length=self.context_length,
                truncation=True,
                return_tensors="np",
            )["input_ids"]
        return np.asarray(rows, np.int64)

    def size(self) -> int:
        """Return one more than the largest token id of ordinary text."""
        return vocabulary_size(self._tokenizer)

    def write(self, path: Path) -> TokenizerSettings:
        """Write `tokenizer.json`.

        Raises:
            ExportError: If no file of the `tokenizers` library gives the ids of transformers.
        """
        texts = [*parity.TEXTS, *_UNUSUAL]
        expected = self.ids(texts)
        settings = TokenizerSettings(self.context_length, self.pad_id, "none")
        right: list[tuple[int, FastTokenizer]] = []
        for fast in self._candidates():
            fast.no_padding()
            fast.no_truncation()
            found = Tokenizer(fast, **settings._asdict()).encode(texts, truncate=True)
            equal = (found == expected).all(axis=1)
            if equal[: len(parity.TEXTS)].all():
                right.append((int(equal.sum()), fast))
        if right:
            max(right, key=lambda each: each[0])[1].save(str(path))
            return settings
        raise ExportError(
            f"{self.directory}: its tokenizer, {type(self._tokenizer).__name__}, cannot be written "
            "as a file of the `tokenizers` library with the same ids; export the image tower alone "
            "with --no-text"
        )

    def _candidates(self) -> Iterator[FastTokenizer]:
        found = [getattr(self._tokenizer, "backend_tokenizer", None)]
        if type(self._tokenizer).__name__ == "SiglipTokenizer":
            found += [siglip_as_fast(self._tokenizer, final_sigma=on) for on in (True, False)]
        if (self.directory / FILE).is_file():
            found.append(FastTokenizer.from_file(str(self.directory / FILE)))
        for each in found:
            if isinstance(each, FastTokenizer):
                fast = FastTokenizer.from_str(each.to_str())
                if self._lower_case is not None:
                    steps = [self._lower_case, *([fast.normalizer] if fast.normalizer else [])]
                    fast.normalizer = normalizers.Sequence(steps)
                yield fast

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
