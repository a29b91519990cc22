"""Tensor messages: each array comes back unchanged, and malformed messages are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crl_sdk.errors import InvalidInputError
from crl_sdk.pb.crl.v1 import embedding_pb2
from crl_sdk.rpc import decode_tensor, encode_tensor

ARRAYS = st.sampled_from(["<f4", ">f4", "<f2", "u1", "i1"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


@given(ARRAYS)
def test_round_trip(array):
    message = embedding_pb2.Tensor.FromString(encode_tensor(array).SerializeToString())
    again = decode_tensor(message)
    assert again.shape == array.shape and again.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(again, array)


def test_golden_bytes():
    message = encode_tensor(np.array([[1.0, -2.0]], np.float32))
    assert message.SerializeToString(deterministic=True).hex() == "0801120201021a080000803f000000c0"


def test_views_are_encoded_by_value():
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(decode_tensor(encode_tensor(array[::2, ::-1])), array[::2, ::-1])


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        (0, [1], b"x"),
        (9, [1], b"x"),
        (1, [2], b"1234"),
        (3, [2**63, 2**63], b""),
        (1, [], b""),
        (3, [2**62, 0, 3], b""),
        (3, [2**63, 0], b""),
        (3, [1] * 100, b"x"),
    ],
)
def test_malformed_messages(dtype, shape, data):
    with pytest.raises(InvalidInputError, match="expected"):
        decode_tensor(embedding_pb2.Tensor(dtype=dtype, shape=shape, data=data))


def test_other_dtypes():
    with pytest.raises(InvalidInputError, match="float64"):
        encode_tensor(np.zeros(2))
