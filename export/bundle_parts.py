"""What `crl export` and `crl import` share: steps, checks of graphs, the place of the bundle.

It needs no torch.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from crl_sdk._version import __version__
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import ExportError, ParityError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import sha256_file
from crl_sdk.model._manifest import MANIFEST, FileEntry, Parity, Precision
from crl_sdk.model._preprocess import PreprocessSpec

Progress = Callable[[str, int, int], None]
"""Function that is called with the current step in words, the number of finished steps, and the
number of all steps."""

TEXT_FILE, TOKENIZER_FILE = "text.onnx", "tokenizer.json"


SPARE_ROWS = 0.9
"""Part of the rows of a table of token embeddings that a tokenizer uses at least. The others fill
the table up to a round number."""

LARGEST_SIDE = 4096
"""Largest height and width of an input in pixels."""


def image_file(precision: Precision) -> str:
    """Return the name of the image graph of a precision."""
    return f"image.{precision}.onnx"


class Steps:
    """Counts the steps of an export and reports the progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        """Start before the first of `total` steps."""
        self._progress, self._total, self._begun = progress, total, 0

    def begin(self, stage: str) -> None:
        """Report that a step begins."""
        if self._progress is not None:
            self._progress(stage, min(self._begun, self._total), self._total)
        self._begun += 1

    def detail(self, stage: str) -> None:
        """Report what the current step does now."""
        if self._progress is not None:
            self._progress(stage, min(self._begun - 1, self._total), self._total)


def check_place(out: Path, overwrite: bool) -> None:
    """Check that a bundle may be written to a directory.

    Raises:
        ExportError: If it is a file, or holds something else, or a bundle that may not be replaced.
    """
    if out.is_file():
        raise ExportError(f"{out}: expected a directory that does not exist yet, got a file")
    if out.name in ("", ".."):
        raise ExportError(f"{out}: expected the name of a new directory, such as {out / 'clip'}")
    if out.is_symlink() and not out.exists():
        raise ExportError(f"{out}: is a link to nothing; remove it, or choose another")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ExportError(f"{out}: exists already; choose another, or pass --overwrite")
        if not (out / MANIFEST).is_file():
            raise ExportError(
                f"{out}: holds files but no {MANIFEST}, so it is not a bundle and is not "
                "overwritten; choose another directory"
            )


def check_preprocessing(spec: PreprocessSpec, where: object, advice: str) -> None:
    """Check that the values of a preprocessing are possible.

    Args:
        spec: The preprocessing.
        where: File or model that it is of, for the error message.
        advice: What to do, for the error message.

    Raises:
        ExportError: If a size, the mean, the standard deviation, the mode or the padding is not.
    """
    if spec.resize_mode not in ("shortest", "longest", "squash") or not 0 <= spec.fill <= 255:
        raise ExportError(
            f"{where}: resize mode {spec.resize_mode!r} and padding {spec.fill}, expected "
            f"shortest, longest or squash, and 0 to 255; {advice}"
        )
    for sides in ((spec.height, spec.width), spec.resize):
        if sides is not None and not all(0 < side <= LARGEST_SIDE for side in sides):
            raise ExportError(
                f"{where}: {sides[0]}×{sides[1]} pixels, expected 1 to {LARGEST_SIDE}; {advice}"
            )
    if not all(math.isfinite(each) for each in (*spec.mean, *spec.std)) or min(spec.std) <= 0:
        raise ExportError(
            f"{where}: mean {spec.mean} and standard deviation {spec.std}, expected numbers, and "
            f"positive ones for the second; {advice}"
        )


def check_image_graph(
    path: Path,
    precision: Precision,
    images: NDArray[np.uint8],
    reference: NDArray[np.float32],
    *,
    strict_int8: bool,
    against: str = "torch fp32",
) -> Parity:
    """Run an image graph and compare it with reference embeddings.

    Args:
        path: Path of the graph.
        precision: Precision of the graph.
        images: Pixels, shape (n, H, W, 3), uint8.
        reference: Their embeddings, shape (n, d), float32, unit rows.
        strict_int8: Whether to fail if int8 exceeds its tolerance, instead of warning.
        against: Where the reference is from, for the error message.

    Raises:
        ParityError: If the projection in the graph is wrong, or the parity outside its tolerance.
    """
    session = open_session(path, precision=precision)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((reference.shape[1], parity.COLUMNS)).astype(np.float32)
    bias = rng.standard_normal(parity.COLUMNS).astype(np.float32)

    def run(rows: NDArray[np.generic]) -> NDArray[np.float32]:
        feeds = {"image": rows, "weight": weight, "bias": bias}
        embedding, projected = session.run(["embedding", "projected"], feeds, quiet_run())
        error = np.abs(projected - (embedding @ weight + bias)).max()
        if not error <= 1e-4:
            raise ParityError(f"{path.name}: the projection inside the graph is off by {error:g}")
        return np.asarray(embedding)

    measured = parity.compare(reference, parity.batched(run, images))
    try:
        parity.require(measured, parity.TOLERANCES[precision], path.name, against)
    except ParityError as error:
        if precision != "int8" or strict_int8:
            raise
        warnings.warn(f"int8 graph kept despite its error: {error}", stacklevel=2)
    return measured


def quiet_run() -> ort.RunOptions:
    """Return options with which a failing run raises its error and does not print it as well."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    return options


def list_files(work: Path) -> dict[str, FileEntry]:
    """Return the entries of all files in the directory of a new bundle."""
    return {
        path.name: FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(work.iterdir())
    }


def tool_versions(tools: Sequence[str]) -> dict[str, str]:
    """Return the versions of the SDK, of Python and of packages, for the manifest."""
    return {
        "crl-sdk": __version__,
        "python": platform.python_version(),
        **{tool: version(tool) for tool in tools},
    }
