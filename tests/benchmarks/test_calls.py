"""What calls ask for: mixes and traces."""

from __future__ import annotations

import json

import pytest

from crl_benchmarks.calls import Call, Mix, read_trace
from crl_benchmarks.images import describe_sizes, synthetic_jpegs
from crl_sdk.errors import InvalidInputError


@pytest.fixture
def write(tmp_path):
    """Write lines to a file and return its path."""

    def written(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_bytes(b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        ))  # fmt: skip
        return path

    return written


def test_a_trace_needs_only_when_calls_are_due(write):
    trace = read_trace(write({"due_seconds": 3.5}, {"due_seconds": 1.5}))
    assert [(each.due, each.counts, each.call) for each in trace.calls] == [
        (0.0, True, Call(1)), (2.0, True, Call(1)),
    ]  # fmt: skip
    assert trace.warm_up == 0 and trace.seconds == 2 and trace.criteria == ()


def test_a_faster_trace_with_a_warm_up(write):
    path = write(
        {"schema": 1, "started": "", "command": "", "address": ""},
        {"due_seconds": 10, "phase": "warm_up", "images": 4, "criteria": ["color"], "load": 8},
        b"",
        {"due_seconds": 14, "phase": "measured", "images": 2, "criteria": ["shape", "color"]},
        {"due_seconds": 18, "phase": "late"},
    )
    trace = read_trace(path, speed=4.0)
    assert [(each.due, each.counts) for each in trace.calls] == [(0, False), (1, True), (2, True)]
    assert (trace.warm_up, trace.seconds, trace.most_images) == (1, 1, 4)
    assert trace.criteria == ("color", "shape")
    assert trace.calls[1].call == Call(2, ("shape", "color"))
    assert [each.call.name for each in trace.calls] == [
        "color, 4 images", "shape+color, 2 images", "no criteria, 1 image",
    ]  # fmt: skip
    assert read_trace(write({"due_seconds": 7})).seconds > 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"due", "malformed"),
        (b"[1]", "Expected `object`"),
        ({"due": 1}, "due_seconds"),
        ({"due_seconds": -1}, ">= 0"),
        ({"due_seconds": "1"}, "Expected `float`"),
        (b'{"due_seconds": 1e999}', "out of range"),
        (b'{"due_seconds": NaN}', "malformed"),
        ({"due_seconds": 1, "images": 0}, ">= 1"),
        ({"due_seconds": 1, "images": 1.5}, "Expected `int`"),
        ({"due_seconds": 1, "images": 10**9}, "<= 4096"),
        ({"due_seconds": 1, "criteria": "color"}, "criteria"),
        ({"due_seconds": 1, "phase": "later"}, "phase"),
        (b'{"due_seconds": 1, "criteria": ["\xff"]}', "UTF-8"),
        (b'{"due_seconds": 1', "truncated"),
    ],
)
def test_a_bad_line_names_its_number(write, line, words):
    path = write({"schema": 1}, {"due_seconds": 0}, line)
    with pytest.raises(InvalidInputError, match=rf"line 3: expected .*{words}"):
        read_trace(path)


def test_a_trace_of_another_schema_or_without_calls(write, tmp_path):
    with pytest.raises(InvalidInputError, match=r"line 1: .*schema 9, this SDK reads 1"):
        read_trace(write({"schema": 9}, {"due_seconds": 0}))
    with pytest.raises(InvalidInputError, match="got 0 calls, all of a warm-up"):
        read_trace(write({"schema": 1}))
    with pytest.raises(InvalidInputError, match="got 1 calls, all of a warm-up"):
        read_trace(write({"due_seconds": 0, "phase": "warm_up"}))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize("text", ["", "color", "color:", "color:0", "color:-1", "color:x", ":1",
                                  "color+:1", "color:1,", "color:1,color:2", "color+color:1",
                                  "color:nan", "color:inf"])  # fmt: skip
def test_mixes_of_another_form(text):
    with pytest.raises(InvalidInputError, match=r"--mix: expected .* color:3,shape:1,color\+shape"):
        Mix.parse(text)


def test_a_mix_comes_in_its_proportions_and_the_same_again():
    mix = Mix.parse("color:3, animal habitat : 1,color+animal habitat:0.5")
    assert mix.criteria == ("color", "animal habitat")
    assert str(mix) == "color:3,animal habitat:1,color+animal habitat:0.5"
    assert Mix.parse(str(mix)) == mix
    drawn = mix.draw(4)
    assert drawn == mix.draw(4) != mix.draw(5)
    assert drawn.count(("color",)) / len(drawn) == pytest.approx(3 / 4.5, abs=0.02)
    assert drawn.count(("color", "animal habitat")) / len(drawn) == pytest.approx(1 / 9, abs=0.02)


def test_sizes_of_images_are_counted():
    images = [each for width in range(30, 40) for each in synthetic_jpegs(1, (width, 20))]
    told = describe_sizes([*images, *images[:1], b"no image"])
    assert told["image_sizes"][0] == "30x20: 2"
    assert told["image_sizes"][-2:] == ["2 other sizes: 2", "not readable: 1"]
    assert (told["smallest_image_pixels"], told["largest_image_pixels"]) == (600, 780)
    assert told["smallest_image_bytes"] == len(b"no image")
    assert describe_sizes([b"xx", b"yyyy"]) == {
        "image_sizes": ["not readable: 2"], "median_image_bytes": 3,
        "smallest_image_bytes": 2, "largest_image_bytes": 4,
    }  # fmt: skip
