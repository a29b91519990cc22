"""What is fuzzed: each target reads bytes, and may raise errors of ours and nothing else."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._gguf import read_header
from crl_sdk.errors import CrlError
from crl_sdk.model._manifest import Manifest, parse_manifest
from crl_sdk.model._preprocess import ImageLimits, PreprocessSpec, load_pixels
from crl_sdk.pb.crl.v1 import embedding_pb2
from crl_sdk.pb.inference import kserve_pb2
from crl_sdk.rpc._tensors import decode_tensor
from crl_sdk.serving._kserve_tensors import read_images
from crl_sdk.serving._shared_memory import SharedMemory

SPECS = (
    PreprocessSpec(32, 32, (0.5,) * 3, (0.5,) * 3),
    PreprocessSpec(32, 32, (0.5,) * 3, (0.5,) * 3, resize=(45, 45)),
    PreprocessSpec(32, 32, (0.5,) * 3, (0.5,) * 3, resize_mode="squash", resize=(45, 36)),
)
LIMITS = ImageLimits(max_pixels=250_000, max_decode_bytes=16 << 20)
_scratch = Path(tempfile.mkdtemp(prefix="crl-fuzz-"))


def image(data: bytes) -> None:
    """Decode an image, exactly and fast, with all of it and with a crop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        for spec, decode in itertools.product(SPECS, ("exact", "fast")):
            try:
                pixels = load_pixels(data, spec, limits=LIMITS, decode=decode)
            except CrlError:
                continue
            assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


def basis(data: bytes) -> None:
    """Read a basis file, and write it again."""
    try:
        read = Basis.from_bytes(data)
    except CrlError:
        return
    rows = read.projection.apply(np.eye(1, read.projection.input_dim, dtype=np.float32))
    assert np.isfinite(rows).all()
    assert Basis.from_bytes(read.to_bytes()).sha256() == read.sha256()


def manifest(data: bytes) -> None:
    """Read the manifest of a bundle."""
    try:
        assert isinstance(parse_manifest(data), Manifest)
    except CrlError:
        return


def tensor(data: bytes) -> None:
    """Decode a tensor of our contract, and the images of a KServe request."""
    try:
        message = embedding_pb2.Tensor.FromString(data)
        array = decode_tensor(message)
        assert array.nbytes == len(message.data)
    except (CrlError, DecodeError):
        pass
    try:
        request = kserve_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        return
    for name in ("IMAGE", "PIXELS", "EMBEDDING"):
        try:
            read_images(request, name, SharedMemory(enabled=False))
        except CrlError:
            continue


def gguf(data: bytes) -> None:
    """Read the header of a language model's file."""
    path = _scratch / "model.gguf"
    path.write_bytes(data)
    try:
        assert read_header(path).parameters >= 0
    except CrlError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "image": image, "basis": basis, "manifest": manifest, "tensor": tensor, "gguf": gguf,
}  # fmt: skip
