"""Addresses of stores: what they mean, what is refused, and passwords that are never shown."""

from __future__ import annotations

import pytest

from crl_sdk.errors import InvalidInputError
from crl_sdk.vector_stores import parse_address


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("qdrant://localhost/photos", "qdrant://localhost:6333/photos"),
        ("qdrant+https://:key@h:1/photos", "qdrant+https://:***@h:1/photos"),
        ("qdrant://[::1]:7/p", "qdrant://[::1]:7/p"),
        ("qdrant://h", "qdrant://h:6333/images"),
        ("qdrant:dir/of it", "qdrant:dir/of it#images"),
        ("lancedb:/a/b#t-1", "lancedb:/a/b#t-1"),
        ("lancedb:s3://bucket/x", "lancedb:s3://bucket/x#images"),
        ("postgres://me:p%40ss@h/db", "postgresql://me:***@h:5432/db#images"),
        ("postgresql://h:1/db#t", "postgresql://h:1/db#t"),
        ("milvus:a.db", "milvus:a.db#images"),
        ("milvus://root:Milvus@h/c", "milvus://root:***@h:19530/c"),
    ],
)
def test_addresses(text, shown):
    address = parse_address(text)
    assert str(address) == repr(address) == shown
    assert parse_address(shown) is not None


def test_the_parts():
    address = parse_address("postgres://me:p%40ss@h/db#t")
    assert (address.user, address.password, address.database) == ("me", "p@ss", "db")
    assert parse_address("postgresql://me@h/db", password="x").password == "x"
    assert parse_address("postgresql://me:own@h/db", password="x").password == "own"
    assert address.scrub("bad  password 'p@ss'\n for me") == "bad password '***' for me"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "unknown kind"),
        ("photos", "unknown kind"),
        ("mysql://hunter2@h/db", "unknown kind"),
        ("qdrant:", "unknown kind"),
        ("qdrant:#x", "no DIR"),
        ("qdrant://:hunter2@/photos", "no host"),
        ("qdrant://:hunter2@h:port/photos", "malformed"),
        ("qdrant://:hunter2@h:99999/photos", "malformed"),
        ("qdrant://h/a/b", "is the path"),
        ("qdrant://h/a#b", "is the path"),
        ("qdrant://h/a;drop", "letters"),
        ("qdrant://h/a?https=1", "options"),
        ("qdrant+https:dir", "//HOST"),
        ("postgresql+https://h/x", "unknown kind"),
        ("lancedb://h/x", "in this process"),
        ("lancedb:d#1", "letters"),
        ("lancedb:d#../x", "letters"),
        ("postgresql:hunter2", "//HOST"),
        ("postgresql://me:hunter2@h", "no database"),
    ],
)
def test_wrong_addresses(text, why):
    with pytest.raises(InvalidInputError, match=why) as caught:
        parse_address(text)
    assert "hunter2" not in str(caught.value) and "lancedb:DIR" in str(caught.value)
