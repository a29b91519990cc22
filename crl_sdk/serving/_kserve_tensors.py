"""Convert tensors of KServe messages to images, and embeddings to tensors.

A tensor's data may be raw bytes, typed contents, or bytes in shared memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.pb.inference import kserve_pb2
from crl_sdk.serving._results import ImageSource
from crl_sdk.serving._shared_memory import SharedMemory

IMAGE, PIXELS, EMBEDDING = "IMAGE", "PIXELS", "EMBEDDING"
UNIVERSAL, CONDITIONAL = "UNIVERSAL", "CONDITIONAL"
DATATYPES = {IMAGE: "BYTES", PIXELS: "UINT8", EMBEDDING: "FP32"}

_FILE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")

Parameters = Mapping[str, kserve_pb2.InferParameter]


def read_images(
    request: kserve_pb2.ModelInferRequest, name: str, memory: SharedMemory
) -> list[ImageSource]:
    """Return the images in the only input of a request.

    Args:
        request: Request for a model.
        name: Name of the model's input: `IMAGE` (BYTES, shape (n) or (n, 1)), `PIXELS` (UINT8,
            shape (n, h, w, 3)) or `EMBEDDING` (FP32, shape (n, d)).
        memory: Registered shared memory.

    Raises:
        InvalidInputError: If the input has another name, datatype or shape, or if its data do not
            fit the shape.
    """
    if [part.name for part in request.inputs] != [name]:
        raise InvalidInputError(
            f"the model {request.model_name!r} takes one input, {name}; got "
            f"{[part.name for part in request.inputs][:8]}"
        )
    tensor = request.inputs[0]
    if tensor.datatype != DATATYPES[tensor.name]:
        raise InvalidInputError(
            f"input {tensor.name}: expected datatype {DATATYPES[tensor.name]}, "
            f"got {tensor.datatype!r}"
        )
    shape = tuple(tensor.shape)
    if not shape or min(shape) < 1:
        raise InvalidInputError(f"input {tensor.name}: expected a shape (n, …), got {shape}")
    if tensor.name == IMAGE:
        if shape not in ((shape[0],), (shape[0], 1)):
            raise InvalidInputError(f"input {IMAGE}: expected shape (n, 1), got {shape}")
        return list(_read_encoded(request, tensor, shape[0], memory))
    rank, wanted = (4, "(n, h, w, 3)") if tensor.name == PIXELS else (2, "(n, d)")
    if len(shape) != rank or (rank == 4 and shape[3] != 3):
        raise InvalidInputError(f"input {tensor.name}: expected shape {wanted}, got {shape}")
    return list(_read_array(request, tensor, shape, memory))


def write_outputs(
    request: kserve_pb2.ModelInferRequest,
    rows: Mapping[str, NDArray[np.float32]],
    memory: SharedMemory,
    reply: kserve_pb2.ModelInferResponse,
) -> None:
    """Write the requested outputs into the reply, or into shared memory if the request says so.

    Args:
        request: Request, which names outputs; without names all outputs are written.
        rows: Embeddings by output name, shape (n, columns), float32.
        memory: Registered shared memory.
        reply: Reply to fill. An output in shared memory leaves an empty entry in
            `raw_output_contents`.

    Raises:
        InvalidInputError: If shared memory has no room for an output.
    """
    wanted: dict[str, Parameters] = {part.name: part.parameters for part in request.outputs}
    for name, parameters in (wanted or {name: {} for name in rows}).items():
        data = np.ascontiguousarray(rows[name], "<f4").tobytes()
        output = reply.outputs.add(name=name, datatype="FP32", shape=rows[name].shape)
        place = _place(parameters)
        if place is not None:
            region, offset, size = place
            memory.write(region, offset, size, data)
            for key in parameters:
                output.parameters[key].CopyFrom(parameters[key])
            output.parameters["shared_memory_byte_size"].int64_param = len(data)
            data = b""
        reply.raw_output_contents.append(data)


def check_outputs(request: kserve_pb2.ModelInferRequest, known: list[str]) -> None:
    """Check the names of the requested outputs, before anything is computed.

    Raises:
        InvalidInputError: If an output does not exist or is requested as a classification.
    """
    for output in request.outputs:
        if output.name not in known:
            raise InvalidInputError(
                f"expected outputs of {known}, got {output.name!r}"
                + ("; name a criterion" if output.name == CONDITIONAL else "")
            )
        if "classification" in output.parameters:
            raise InvalidInputError(
                "expected no parameter `classification`: the outputs are embeddings, which this "
                "server does not classify"
            )


def _read_encoded(
    request: kserve_pb2.ModelInferRequest,
    tensor: kserve_pb2.ModelInferRequest.InferInputTensor,
    count: int,
    memory: SharedMemory,
) -> list[bytes]:
    raw = _raw(request, tensor, memory)
    if raw is None:
        images = list(tensor.contents.bytes_contents)
    elif count == 1 and raw.startswith(_FILE_SIGNATURES) and _first_length(raw) > len(raw) - 4:
        images = [raw]  # perf_analyzer sends b64 files without a length before them
    else:
        images = []
        at = 0
        while at + 4 <= len(raw) and len(images) <= count:
            length = _first_length(raw[at : at + 4])
            images.append(raw[at + 4 : at + 4 + length])
            at += 4 + length
        if at != len(raw):
            raise InvalidInputError(
                f"input {IMAGE}: expected elements of a little-endian uint32 length and that many "
                f"bytes, got {len(raw)} bytes that end within element {len(images)}"
            )
    if len(images) != count:
        got = "more" if len(images) > count else len(images)
        raise InvalidInputError(f"input {IMAGE}: expected {count} elements, got {got}")
    return images


def _first_length(raw: bytes) -> int:
    return int(struct.unpack("<I", raw[:4])[0]) if len(raw) >= 4 else 0


def _read_array(
    request: kserve_pb2.ModelInferRequest,
    tensor: kserve_pb2.ModelInferRequest.InferInputTensor,
    shape: tuple[int, ...],
    memory: SharedMemory,
) -> NDArray[Any]:
    dtype = np.dtype("u1") if tensor.name == PIXELS else np.dtype("<f4")
    raw = _raw(request, tensor, memory)
    if raw is None:
        typed = tensor.contents
        values = typed.uint_contents if tensor.name == PIXELS else typed.fp32_contents
        if tensor.name == PIXELS and values and max(values) > 255:
            raise InvalidInputError(f"input {PIXELS}: expected values up to 255, got {max(values)}")
        array: NDArray[Any] = np.array(values, dtype)
    else:
        array = np.frombuffer(raw, np.uint8)
        if array.nbytes == math.prod(shape) * dtype.itemsize:
            array = array.view(dtype)
    if array.dtype != dtype or array.size != math.prod(shape):
        raise InvalidInputError(
            f"input {tensor.name}: expected {math.prod(shape) * dtype.itemsize} bytes for shape "
            f"{shape} of {tensor.datatype}, got {array.nbytes}"
        )
    return array.reshape(shape)


def _raw(
    request: kserve_pb2.ModelInferRequest,
    tensor: kserve_pb2.ModelInferRequest.InferInputTensor,
    memory: SharedMemory,
) -> bytes | None:
    """Return the raw bytes of the only input, or None if its contents are typed."""
    place = _place(tensor.parameters)
    sources = (place is not None, bool(request.raw_input_contents), tensor.HasField("contents"))
    if sum(sources) != 1 or len(request.raw_input_contents) > 1:
        raise InvalidInputError(
            f"input {tensor.name}: expected its data once, in shared memory, raw_input_contents or "
            f"contents; got {sources[0]:d}, {len(request.raw_input_contents)} and {sources[2]:d}"
        )
    if place is not None:
        return memory.read(*place)
    return request.raw_input_contents[0] if sources[1] else None


def _place(parameters: Parameters) -> tuple[str, int, int] | None:
    """Return region, offset and size of a tensor in shared memory, or None if it is not there."""
    if "shared_memory_region" not in parameters:
        return None
    return (
        parameters["shared_memory_region"].string_param,
        _integer(parameters, "shared_memory_offset"),
        _integer(parameters, "shared_memory_byte_size"),
    )


def _integer(parameters: Parameters, key: str) -> int:
    if key not in parameters:
        return 0
    value = parameters[key]
    return value.uint64_param if value.HasField("uint64_param") else value.int64_param
