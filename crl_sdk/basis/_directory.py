"""A directory of bases: one subdirectory for each model, one file for each criterion.

```
bases/
  4f1e8c0d2a7b6e35/                     a model: the first 16 digits of its fingerprint
    color.safetensors
    animal+habitat.safetensors
  name-openai-clip-vit-b-32-1a2b3c4d/   a model without a bundle: its name and a digest of it
    color.safetensors
```
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis
from crl_sdk.errors import CriterionError
from crl_sdk.model._fingerprint import is_name
from crl_sdk.storage._checksummed_safetensors import SUFFIX

_DIGITS = 16
_NAME_LENGTH = 60


class BasisDirectory:
    """The bases of any number of models. No file is opened before `load`.

    Attributes:
        path: The directory. It need not exist.

    Example:
        >>> BasisDirectory("bases").path_of("Animal habitat", "4f1e8c0d2a7b6e35" * 4).as_posix()
        'bases/4f1e8c0d2a7b6e35/animal+habitat.safetensors'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Store the path."""
        self.path = Path(path)

    def __repr__(self) -> str:
        """Return the path."""
        return f"BasisDirectory({str(self.path)!r})"

    def of_model(self, fingerprint: str) -> Path:
        """Return the subdirectory of a model. It need not exist."""
        if is_name(fingerprint):  # names that differ in other characters only differ in the digest
            digest = hashlib.sha256(fingerprint.encode()).hexdigest()
            readable = re.sub(r"[^A-Za-z0-9._-]+", "-", fingerprint)[:_NAME_LENGTH]
            return self.path / f"{readable}-{digest[:8]}"
        return self.path / fingerprint[:_DIGITS]

    def path_of(self, criterion: str, fingerprint: str) -> Path:
        """Return the path of a criterion's basis for a model. It need not exist.

        Raises:
            CriterionError: If the criterion is malformed, so that it never becomes part of a path.
        """
        return self.of_model(fingerprint) / basis_file_name(criterion)

    def criteria(self, fingerprint: str | None = None) -> list[str]:
        """Return the criteria that a model has bases of, or that any has, sorted."""
        folders = self._models() if fingerprint is None else [self.of_model(fingerprint)]
        names = {path.stem for folder in folders for path in folder.glob(f"*{SUFFIX}")}
        return sorted(name.replace("+", " ") for name in names)

    def files(self, criterion: str | None = None) -> list[Path]:
        """Return the files of a criterion, or of all, sorted by model and criterion."""
        name = "*" + SUFFIX if criterion is None else basis_file_name(criterion)
        return [path for folder in self._models() for path in sorted(folder.glob(name))]

    def load(self, criterion: str, fingerprint: str | None = None) -> Basis:
        """Load the basis of a criterion.

        Args:
            criterion: Name of the criterion.
            fingerprint: Fingerprint of the model. None if there is one model only.

        Raises:
            CriterionError: If there is no such basis, or several models have one and none is named.
                The message lists what there is.
            BasisError: If the file cannot be read.
            BasisMismatchError: If the file holds a basis of another model.
            IntegrityError: If the file is not a basis file.
        """
        if fingerprint is None:
            found = self.files(criterion)
            if len(found) > 1:
                raise CriterionError(
                    f"{len(found)} models have a basis {criterion!r} in {self.path}: name the "
                    f"model, or one of the files {', '.join(map(str, found))}"
                )
        else:
            path = self.path_of(criterion, fingerprint)
            found = [path] if path.exists() else []
        if not found:
            raise CriterionError(self._missing(criterion, fingerprint))
        basis = Basis.load(found[0])
        if fingerprint is not None:
            basis.require_fingerprint(fingerprint)
        return basis

    def _missing(self, criterion: str, fingerprint: str | None) -> str:
        known = ", ".join(self.criteria(fingerprint)) or "none"
        of = " of this model" if fingerprint is not None else ""
        message = f"no basis {criterion!r}{of} in {self.path}, which has {known}"
        if fingerprint is not None and self.files(criterion):
            message += "; another model has one"
        loose = self.path / basis_file_name(criterion)
        if loose.exists():
            message += f"; {loose} is not in the directory of a model: name it as a file"
        return message

    def _models(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(each for each in self.path.iterdir() if each.is_dir())


def basis_file_name(criterion: str) -> str:
    """Return the name of the file of a criterion's basis.

    Spaces become `+`, which no criterion contains, so different criteria have different files.

    Raises:
        CriterionError: If the criterion is malformed.

    Example:
        >>> basis_file_name("Animal habitat")
        'animal+habitat.safetensors'
    """
    return f"{normalise_criterion(criterion).replace(' ', '+')}{SUFFIX}"
