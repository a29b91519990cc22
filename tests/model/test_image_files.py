"""Image files are searched for in one place, and only regular files are read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from crl_sdk import Embedder, demo_bundle
from crl_sdk._image_bytes import read_image_file
from crl_sdk.errors import ImageError, ImageTooLargeError, InvalidInputError
from crl_sdk.model import _image_formats as formats
from crl_sdk.model._image_files import find_image_files, printable_path
from crl_sdk.model._preprocess import ImageLimits, PreprocessSpec, load_pixels

SPEC = PreprocessSpec(16, 16, (0.5,) * 3, (0.5,) * 3)
SUFFIXES = sorted(each for name in formats.DEFAULT_FORMATS for each in formats.SUFFIXES[name])


def test_directories_are_searched_to_the_bottom_and_sorted(tmp_path):
    deep = tmp_path / "b" / "c"
    deep.mkdir(parents=True)
    expected = [tmp_path / "a.JPG", *(deep / f"x{suffix}" for suffix in SUFFIXES)]
    for file in (*expected, tmp_path / "notes.txt", deep / "x.tga"):
        file.touch()
    assert find_image_files([tmp_path]) == expected
    more = formats.parse_formats("TGA")
    assert deep / "x.tga" in find_image_files([tmp_path], formats=more)
    loose = tmp_path / "notes.txt"
    assert find_image_files([loose, deep]) == [loose, *expected[1:]]
    assert find_image_files([Path("missing.jpg")]) == [Path("missing.jpg")]


def test_a_directory_without_images_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="no image files in this directory"):
        find_image_files([tmp_path])


@pytest.fixture
def irregular(tmp_path):
    """A directory with one image, and with what only has the name of an image."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "nothing.png").symlink_to("nowhere")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        yield tmp_path


def test_what_is_no_file_is_named_and_never_read(irregular):
    told = []
    assert find_image_files([irregular], leave_out=told.append) == [irregular / "a.png"]
    text = "\n".join(sorted(told))
    assert len(told) == 4 and text.count("not a file, but a pipe, socket or device") == 3
    assert "nothing.png: cannot be read (No such file" in text
    for name, words in [("pipe.jpg", "a named pipe"), ("zero.png", "a device"),
                        ("folder.png", "a directory"), ("s.png", "cannot be read"),
                        ("nothing.png", "cannot be read")]:  # fmt: skip
        with pytest.raises(ImageError, match=words):
            load_pixels(irregular / name, SPEC)
    with Embedder.open(demo_bundle()) as embedder:
        names = sorted(irregular.iterdir())
        result = embedder.embed(names, on_error="collect")
    assert result.ok.tolist() == [path.name == "a.png" for path in names]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_a_directory_that_cannot_be_read_is_named(tmp_path):
    check_unreadable(tmp_path)


def test_a_directory_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    """As above, for root: the system refuses to list the directory."""
    real = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    check_unreadable(tmp_path)


def check_unreadable(tmp_path):
    (tmp_path / "secret").mkdir(mode=0)
    (tmp_path / "a.png").touch()
    told = []
    assert find_image_files([tmp_path], leave_out=told.append) == [tmp_path / "a.png"]
    assert told == [f"{tmp_path / 'secret'}: cannot be searched (Permission denied)"]


def test_a_file_that_does_not_know_its_size_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    assert read_image_file(path, "a", 100) == b"x" * 100
    with pytest.raises(ImageTooLargeError, match="100 bytes are over the limit of 99"):
        read_image_file(path, "a", 99)
    growing = Path("/proc/self/maps")  # its size is said to be 0
    if growing.exists():
        with pytest.raises(ImageTooLargeError, match="over the limit of 10"):
            read_image_file(growing, "maps", 10)


def test_names_that_are_not_utf8_are_printable():
    path = Path(os.fsdecode(b"caf\xe9.png"))
    assert printable_path(path) == r"caf\xe9.png"
    assert printable_path(Path("café.png")) == "café.png"


@pytest.mark.parametrize("name", [n for n in formats.SUFFIXES if n not in ("PSD", "XPM", "XBM")])
def test_every_format_is_read_when_it_is_allowed(tmp_path, name):
    path = tmp_path / f"a{formats.SUFFIXES[name][0]}"
    Image.new("RGB", (32, 32), (200, 30, 40)).save(path, None if name == "ICO" else name)
    wanted = ImageLimits(formats=formats.parse_formats(name))
    found = load_pixels(path, SPEC, limits=wanted).mean(axis=(0, 1))
    assert abs(found - (200, 30, 40)).max() < 6
    if name in formats.DEFAULT_FORMATS:
        load_pixels(path, SPEC)
    else:
        words = f"its format is {name}, which is not read by default: pass --formats"
        with pytest.raises(ImageError, match=words):
            load_pixels(path, SPEC)
        with pytest.raises(ImageTooLargeError):
            load_pixels(path, SPEC, limits=ImageLimits(max_pixels=100, formats=wanted.formats))


def test_formats_are_named_in_any_case_and_checked():
    assert formats.parse_formats(" jp2, Tga,") == (*formats.DEFAULT_FORMATS, "JPEG2000", "TGA")
    with pytest.raises(InvalidInputError, match=r"expected formats among JPEG, .*; got 'EPS'"):
        ImageLimits(formats=("EPS",))  # Pillow would run Ghostscript


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (1, 1)])
def test_the_rule_for_small_sides_is_in_the_message(size):
    with pytest.raises(ImageError, match=r"must have at least 2 \(ImageLimits.min_side\)"):
        load_pixels(Image.new("RGB", size), SPEC)
    assert load_pixels(Image.new("RGB", (1, 1)), SPEC, limits=ImageLimits(min_side=1)).any() == 0
