"""Files that are replaced completely or not at all, and JSON records."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from crl_sdk.errors import BasisError, PlanError
from crl_sdk.storage import _atomic_files
from crl_sdk.storage._atomic_files import (
    delete_file,
    make_directory,
    new_directory,
    new_file,
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


def age(path, seconds=3600.0):
    """Make a file look as if it had been written long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def killed_while_writing(kind, path):
    """Kill a process with SIGKILL while it writes a file or directory; return what it left."""
    code = (
        "import sys, time, pathlib\n"
        "from crl_sdk.errors import BasisError\n"
        f"from crl_sdk.storage._atomic_files import {kind}\n"
        f"with {kind}(pathlib.Path(sys.argv[1]), BasisError) as made:\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(300)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    with run:
        assert run.stdout.readline() == "writing\n"
        (left,) = [each for each in path.parent.iterdir() if each.name.endswith(".tmp")]
        age(left)
        with new_file(path, BasisError) as file:  # a writer that is alive keeps its file
            file.write(b"other")
        assert left.exists()
        path.unlink()
        run.send_signal(signal.SIGKILL)
    return left


@pytest.mark.parametrize("kind", ["new_file", "new_directory"])
def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path, kind):
    path = tmp_path / "a [1]*.bin"
    left = killed_while_writing(kind, path)
    assert left.exists() and not path.exists()
    stranger = tmp_path / ".b.bin.x.tmp"  # of another file
    stranger.touch()
    age(stranger)
    young = tmp_path / f".{path.name}.young.tmp"  # of a process that may be about to lock it
    young.touch()
    write_atomically(path, b"new", BasisError)
    assert not left.exists() and stranger.exists() and young.exists()
    assert path.read_bytes() == b"new"


def test_a_directory_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "bundle"
    for content in (b"old", b"new"):
        with new_directory(path, BasisError) as work:
            (work / "sub").mkdir()
            (work / "sub" / "file").write_bytes(content)
        assert (path / "sub" / "file").read_bytes() == content
        assert path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(KeyError), new_directory(path, BasisError) as work:
        (work / "file").touch()
        raise KeyError("the caller's error")
    assert os.listdir(tmp_path) == ["bundle"] and (path / "sub" / "file").read_bytes() == b"new"
    with (
        pytest.raises(BasisError, match="nowhere/x: cannot be written"),
        new_directory(tmp_path / "nowhere" / "x", BasisError),
    ):
        pass


def test_a_swap_that_was_killed_between_its_renames_is_undone(tmp_path):
    path = tmp_path / "bundle"
    left = tmp_path / ".bundle.abc.tmp"
    (left / "bundle").mkdir(parents=True)
    (left / "bundle" / "file").touch()
    age(left)
    with pytest.raises(KeyError), new_directory(path, BasisError):
        raise KeyError
    assert (path / "file").exists() and os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_swap_that_is_interrupted_keeps_the_old_directory(tmp_path, monkeypatch, stopped):
    """Ctrl-C right after a rename: of the old directory, or of the new one."""
    path = tmp_path / "bundle"
    with new_directory(path, BasisError) as work:
        (work / "old").touch()
    renames = []
    real = os.rename

    def rename(old, new):
        real(old, new)
        renames.append(new)
        if len(renames) == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(_atomic_files.Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), new_directory(path, BasisError) as work:
        (work / "new").touch()
    assert os.listdir(tmp_path) == ["bundle"]
    assert os.listdir(path) == ["old" if stopped == 1 else "new"]


def test_files_and_their_directory_are_on_the_disk_before_the_write_returns(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(opened):
        done.append(os.path.realpath(f"/proc/self/fd/{opened}"))
        real_sync(opened)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(
        _atomic_files.Path, "replace", lambda old, new: (done.append("rename"),
                                                         real_replace(old, new))
    )  # fmt: skip
    write_atomically(tmp_path / "x", b"1", BasisError)
    assert len(done) == 3 and done[1:] == ["rename", str(tmp_path)]
    assert done[0].startswith(str(tmp_path / ".x."))
    done.clear()
    with new_directory(tmp_path / "d", BasisError) as work:
        (work / "f").touch()
    assert done == [str(work / "f"), str(work), str(tmp_path)]


def test_new_directories_and_deleted_files_are_on_the_disk(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(_atomic_files, "_sync", done.append)
    make_directory(tmp_path / "a" / "b", BasisError)
    assert sorted(done) == [tmp_path, tmp_path / "a"]
    done.clear()
    make_directory(tmp_path / "a" / "b", BasisError)
    assert not done
    (tmp_path / "a" / "file").touch()
    delete_file(tmp_path / "a" / "file")
    assert done == [tmp_path / "a"] and not (tmp_path / "a" / "file").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.ENOTSUP])
def test_a_directory_that_cannot_be_synchronised_does_no_harm(tmp_path, monkeypatch, number):
    real = os.fsync

    def sync(opened):
        if os.path.isdir(f"/proc/self/fd/{opened}"):
            raise OSError(number, os.strerror(number))
        real(opened)

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "x", b"1", BasisError)
    with new_directory(tmp_path / "d", BasisError) as work:
        (work / "f").touch()
    assert (tmp_path / "x").read_bytes() == b"1" and (tmp_path / "d" / "f").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt), new_file(path, BasisError) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
