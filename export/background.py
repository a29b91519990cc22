"""Adds the background to a bundle: embeddings of generic texts by the bundle's own text tower.

The projection method `contrastive` uses them to see how texts vary that are about nothing in
particular. The bundle needs no torch for this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from crl_export.bundle_files import put_file
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._background import BACKGROUND_FILE, encode_background
from crl_sdk.model._bundle import ModelBundle

MIN_TEXTS = 50
"""Smallest number of distinct texts of a background. On real vectors, 60 generic nouns served
nearly as well as 1,615; fewer were not tried."""

_BATCH = 64
_MIN_SPREAD = 1e-3  # mean squared distance of the embeddings from their mean


def generic_texts() -> tuple[str, ...]:
    """Return the generic English texts that `crl export` uses by default."""
    content = files("crl_export").joinpath("background.txt").read_text(encoding="utf-8")
    return tuple(line for line in content.splitlines() if line and not line.startswith("#"))


def add_background(
    directory: str | os.PathLike[str], texts: Sequence[str] | None = None
) -> ModelBundle:
    """Embed generic texts with a bundle's text tower and store them in the bundle.

    Args:
        directory: Directory of the bundle.
        texts: Generic texts, at least 50. None for those of `generic_texts`.

    Returns:
        The bundle, opened and verified again.

    Raises:
        BundleError: If there is no bundle, or it has no text tower.
        InvalidInputError: If there are too few texts, one is too long for the model, or the model
            gives all of them the same embedding.
        ExportError: If the bundle cannot be written.
    """
    bundle = ModelBundle.open(directory)
    distinct = list(dict.fromkeys(generic_texts() if texts is None else texts))
    if len(distinct) < MIN_TEXTS:
        raise InvalidInputError(
            f"expected at least {MIN_TEXTS} distinct background texts, got {len(distinct)}: add "
            "texts of many different subjects"
        )
    tokens = bundle.tokenizer().encode(distinct)
    session = open_session(bundle.text_graph())
    embeddings = np.concatenate(
        [
            session.run(["embedding"], {"tokens": tokens[start : start + _BATCH]})[0]
            for start in range(0, len(tokens), _BATCH)
        ]
    )
    spread = float(np.square(embeddings - embeddings.mean(axis=0)).sum(axis=1).mean())
    if spread < _MIN_SPREAD:
        raise InvalidInputError(
            f"the model gives all background texts nearly the same embedding (spread {spread:.1g}):"
            " give texts that it knows"
        )
    return put_file(bundle, BACKGROUND_FILE, encode_background(distinct, embeddings))
