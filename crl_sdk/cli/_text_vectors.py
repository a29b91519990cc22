"""Bases from files of text embeddings, for `crl basis create --vectors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._from_vectors import build_basis_from_vectors
from crl_sdk.cli._console import note
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._vectors import TEXT, VectorFile, read_background, read_text_vectors
from crl_sdk.model._fingerprint import fingerprint_of_name, require_same_model


def fingerprint(path: Path, model: str | None) -> str:
    """Return the fingerprint of the model that made a file of text embeddings.

    Args:
        path: The `.npz` or `.parquet` file.
        model: Name of the model; None if the file has its fingerprint.

    Raises:
        InvalidInputError: If the file cannot be read, or its model is not known.
        BasisMismatchError: If the file has another fingerprint than `model`.
    """
    stored = VectorFile(path).fingerprint()
    if stored is None and model is None:
        raise InvalidInputError(
            f"{path}: the file does not say which model made the embeddings: name it with "
            "--model NAME, such as --model openai/clip-vit-base-patch32"
        )
    named = None if model is None else fingerprint_of_name(model)
    if stored is not None and named is not None:
        require_same_model(
            str(path), stored, named, used_with="--model",
            remedy="leave out --model, the file names its model itself",
        )  # fmt: skip
    return named or str(stored)


def make_basis(
    path: Path, criterion: str, words: list[str], fingerprint: str, options: dict[str, Any]
) -> Basis:
    """Make a basis from a file of text embeddings.

    Args:
        path: The `.npz` or `.parquet` file.
        criterion: Name of the criterion.
        words: Words to take from a bank; empty for those that the file has for the criterion.
        fingerprint: Fingerprint of the model, see `fingerprint`.
        options: Options of `build_basis_from_vectors`.

    Raises:
        InvalidInputError: If the file cannot be read or has no texts of the criterion.
    """
    file = VectorFile(path)
    name = normalise_criterion(criterion)
    own = next((each for each in file.names if each in (TEXT + criterion, TEXT + name)), "text")
    dim = file.read(own, "text embeddings (k, d)").shape[-1]
    known, notes = read_text_vectors([file], {name: words} if words else {}, dim)
    for each in notes:
        note(each)
    background = read_background([file], None, known, dim)
    if name not in known:
        raise InvalidInputError(
            f"{path}: no texts of {name!r}, the file has {', '.join(known) or 'none'}: name the "
            "criterion as in the file, or choose words of a bank with --text or --texts"
        )
    return build_basis_from_vectors(
        name, known[name].texts, known[name].embeddings, model=fingerprint,
        background=background, provenance={"source": str(path)}, **options,
    )  # fmt: skip
