"""Random messages for every RPC of both contracts: no status says that the server failed.

`make walks` sends many more.
"""

from __future__ import annotations

import os
import struct

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crl_sdk import Client
from crl_sdk.pb.crl.v1 import basis_pb2, embedding_pb2
from crl_sdk.pb.inference import kserve_pb2

EXAMPLES = int(os.environ.get("CRL_WALKS", "15"))
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

RPCS = [
    (f"/{service.full_name}/{method.name}", method)
    for contract in (embedding_pb2, basis_pb2, kserve_pb2)
    for service in contract.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

_WORDS = st.sampled_from(
    ["color", "shape", "Color", "", "crl", "crl-color", "crl:color", "IMAGE", "PIXELS", "EMBEDDING",
     "UNIVERSAL", "CONDITIONAL", "criterion", "BYTES", "UINT8", "FP32", "1", "l2", "cosine",
     "contrastive", "{}", "a photo of {}", "red", "\x00", "色", "../../x", "x" * 300]
)  # fmt: skip
_INTEGERS = st.sampled_from([0, 1, 2, 3, 4, 96, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1])
_SIGNED = st.one_of(_INTEGERS, _INTEGERS.map(lambda value: -value))
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63"
    "f8cfc0f01f0005000201a3d2f4b80000000049454e44ae426082"
)
_BYTES = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([_PNG, b"", bytes(128 * 4), bytes(96 * 96 * 3),
                     struct.pack("<I", len(_PNG)) + _PNG, b"\xff\xd8\xff" + bytes(40)]),
)  # fmt: skip
_FLOATS = st.sampled_from([0.0, 1.0, -1.0, 3e38, float("nan"), float("inf")])

_SCALARS = {
    FieldDescriptor.TYPE_STRING: _WORDS,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_DOUBLE: _FLOATS,
    FieldDescriptor.TYPE_UINT32: _INTEGERS.filter(lambda value: value < 2**32),
    FieldDescriptor.TYPE_UINT64: _INTEGERS,
    FieldDescriptor.TYPE_INT32: _SIGNED.filter(lambda value: -(2**31) <= value < 2**31),
    FieldDescriptor.TYPE_INT64: _SIGNED,
    FieldDescriptor.TYPE_ENUM: st.integers(0, 6),
}


def values(field, depth):
    if field.message_type is None:
        return _SCALARS[field.type]
    return messages(field.message_type, depth - 1)


@st.composite
def messages(draw, descriptor, depth=4):
    """Draw a message: each field is left out, or has a value that is often meant seriously."""
    message = GetMessageClass(descriptor)()
    chosen = {}
    for field in descriptor.fields:
        if (depth == 0 and field.message_type) or draw(st.integers(0, 2)) == 0:
            continue
        if field.containing_oneof is not None:
            chosen[field.containing_oneof.name] = field
        else:
            chosen[field.name] = field
    for field in chosen.values():
        many = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            key = draw(_WORDS.filter(bool))
            if entry["value"].message_type is None:
                getattr(message, field.name)[key] = draw(_SCALARS[entry["value"].type])
            else:
                made = draw(messages(entry["value"].message_type, depth - 1))
                getattr(message, field.name)[key].CopyFrom(made)
        elif many:
            found = draw(st.lists(values(field, depth), max_size=3))
            getattr(message, field.name).extend(found)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values(field, depth)))
        else:
            setattr(message, field.name, draw(values(field, depth)))
    return message


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A server of its own, with a small limit on messages of generation: it has no model."""
    from server_fixtures import Server

    from crl_sdk import Embedder, demo_bundle
    from crl_sdk.serving._server import ServerSettings

    with Embedder.open(demo_bundle()) as embedder:
        bases = tmp_path_factory.mktemp("bases")
        server = Server(embedder, ServerSettings(address="127.0.0.1:0", bases=bases))
        with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
            client.create_basis("color", ["red", "green", "blue"])
            yield channel
            client.create_basis("color", ["red", "green", "blue"])
            assert client.embed([_PNG], on_error="collect").errors  # too small, and served
        server.stop()


@pytest.mark.parametrize(("name", "method"), RPCS, ids=[name for name, _ in RPCS])
def test_random_messages_never_make_the_server_fail(walked, name, method):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="CRL_WALKS" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(messages(method.input_type), min_size=1, max_size=2))
    def walk(sent):
        raw = [message.SerializeToString() for message in sent]
        streams = (method.client_streaming, method.server_streaming)
        try:
            if streams == (False, False):
                walked.unary_unary(name)(raw[0], timeout=60)
            elif streams == (False, True):
                list(walked.unary_stream(name)(raw[0], timeout=60))
            else:
                replies = list(walked.stream_stream(name)(iter(raw), timeout=60))
                for reply in replies:
                    parsed = GetMessageClass(method.output_type).FromString(reply)
                    assert "the server failed" not in str(parsed)
        except grpc.RpcError as error:
            assert error.code() not in OURS, (name, error.details(), sent)
            assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, (name, sent)

    walk()
