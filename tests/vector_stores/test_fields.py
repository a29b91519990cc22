"""Names of vectors: reversible, distinct, and accepted by every store."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_sdk.errors import CriterionError, InvalidInputError
from crl_sdk.vector_stores import criterion_of, field_of

CRITERIA = st.from_regex(r"[a-z0-9][a-z0-9 _-]{0,40}", fullmatch=True).map(
    lambda text: " ".join(text.split())
)


@given(CRITERIA.filter(lambda name: name != "universal"))
def test_names_are_reversible(criterion):
    assert criterion_of(field_of(criterion)) == criterion


@given(CRITERIA.filter(lambda name: name != "universal"))
def test_names_are_identifiers(criterion):
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", field_of(criterion))


def test_what_looks_alike_is_distinct():
    alike = ["a b", "a_b", "a-b", "aub", "ahb", "3d", "path", "cpath", "id", "xmin"]
    names = [field_of(each) for each in alike]
    assert len(set(names)) == len(names) and not {"path", "id", "xmin"} & set(names)
    assert [criterion_of(name) for name in names] == alike


def test_what_is_refused():
    with pytest.raises(CriterionError):
        field_of("colour; DROP TABLE")
    with pytest.raises(InvalidInputError, match="64 characters"):
        field_of("x" * 64)
    with pytest.raises(InvalidInputError, match="another name"):
        field_of("universal")
