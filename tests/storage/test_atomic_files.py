"""Files that are replaced completely or not at all, and JSON records."""

from __future__ import annotations

import os

import msgspec
import pytest

from crl_sdk.errors import BasisError, PlanError
from crl_sdk.storage._atomic_files import (
    make_directory,
    read_record,
    write_atomically,
    write_record,
)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    name: str


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "color.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BasisError, match="No space left"):
        write_atomically(path, b"new", BasisError)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    with pytest.raises(BasisError, match="cannot be written"):
        write_atomically(tmp_path / "nowhere" / "x", b"new", BasisError)


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, Record(1, "x"), PlanError)
    assert read_record(path, Record, 1, PlanError, "write it again") == Record(1, "x")
    with pytest.raises(PlanError, match="schema 1, this SDK reads 2; write it again"):
        read_record(path, Record, 2, PlanError, "write it again")
    path.write_bytes(b"{}")
    with pytest.raises(PlanError, match=r"not a readable record .*; write it again"):
        read_record(path, Record, 1, PlanError, "write it again")
    path.unlink()
    with pytest.raises(PlanError, match=r"record.json: cannot be read \(No such file .*; write it"):
        read_record(path, Record, 1, PlanError, "write it again")


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    make_directory(tmp_path / "a" / "b", BasisError)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(BasisError, match="cannot be created"):
        make_directory(tmp_path / "file" / "b", BasisError)
