"""Image files are searched for in one place, with one list of suffixes."""

from __future__ import annotations

from pathlib import Path

import pytest

from crl_sdk.errors import ImageError
from crl_sdk.model._image_files import IMAGE_SUFFIXES, find_image_files


def test_directories_are_searched_to_the_bottom_and_sorted(tmp_path):
    deep = tmp_path / "b" / "c"
    deep.mkdir(parents=True)
    expected = [tmp_path / "a.JPG", *(deep / f"x{suffix}" for suffix in sorted(IMAGE_SUFFIXES))]
    for file in (*expected, tmp_path / "notes.txt"):
        file.touch()
    assert find_image_files([tmp_path]) == expected
    loose = tmp_path / "notes.txt"
    assert find_image_files([loose, deep]) == [loose, *expected[1:]]
    assert find_image_files([Path("missing.jpg")]) == [Path("missing.jpg")]


def test_a_directory_without_images_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="no image files in this directory"):
        find_image_files([tmp_path])
