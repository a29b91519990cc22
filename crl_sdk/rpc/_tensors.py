"""NumPy arrays as `Tensor` messages, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.pb.crl.v1 import embedding_pb2

_DTYPES: dict[embedding_pb2.Dtype.ValueType, np.dtype[Any]] = {
    embedding_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    embedding_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    embedding_pb2.DTYPE_UINT8: np.dtype("u1"),
    embedding_pb2.DTYPE_INT8: np.dtype("i1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def encode_tensor(array: NDArray[Any]) -> embedding_pb2.Tensor:
    """Return an array as a message.

    Args:
        array: Array of any shape, float32, float16, uint8 or int8.

    Raises:
        InvalidInputError: If the dtype is another one.
    """
    code = dtype_code(array.dtype)
    little = np.ascontiguousarray(array, dtype=_DTYPES[code])
    return embedding_pb2.Tensor(dtype=code, shape=array.shape, data=little.tobytes())


def dtype_code(dtype: np.dtype[Any]) -> embedding_pb2.Dtype.ValueType:
    """Return the code of a dtype in messages.

    Raises:
        InvalidInputError: If it has none.
    """
    code = _CODES.get(dtype.newbyteorder("<"))
    if code is None:
        raise InvalidInputError(
            f"expected an array of float32, float16, uint8 or int8, got {dtype}: convert it first"
        )
    return code


def decode_tensor(tensor: embedding_pb2.Tensor) -> NDArray[Any]:
    """Return the array in a message.

    Returns:
        A read-only view of the bytes of the message, with its shape and dtype.

    Raises:
        InvalidInputError: If the dtype is unknown, or the shape does not fit the number of bytes.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        known = ", ".join(embedding_pb2.Dtype.Name(code) for code in _DTYPES)
        raise InvalidInputError(f"expected a tensor of dtype {known}, got {tensor.dtype}")
    shape = tuple(tensor.shape)
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(tensor.data):
        raise InvalidInputError(
            f"expected {expected} bytes for shape {shape} of {dtype}, got {len(tensor.data)}"
        )
    try:
        return np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except (ValueError, OverflowError) as error:  # NumPy bounds the sizes and their number
        raise InvalidInputError(
            f"expected the shape of an array, got {shape[:8]} ({error})"
        ) from error
