"""What calls ask for: the same each time, or the calls of a recorded trace at their times."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from crl_benchmarks.call_records import SCHEMA
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._json import decode_json

_DRAWN = 16384
"""Number of calls of a mix that are drawn. They repeat then."""

_SHORTEST = 0.1
"""Least number of measured seconds of a trace, which may have a single call."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a call asks for.

    Attributes:
        images: Number of images.
        criteria: Criteria, for crl's own API.
    """

    images: int
    criteria: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The criteria and the number of images, such as `color+shape, 2 images`."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return f"{'+'.join(self.criteria) or 'no criteria'}, {images}"


@dataclass(frozen=True, slots=True)
class Mix:
    """Criteria of calls, and how often each combination comes.

    Attributes:
        kinds: The combinations of criteria.
        weights: Weight of each.
    """

    kinds: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        pairs = zip(self.kinds, self.weights, strict=True)
        return ",".join(f"{'+'.join(names)}:{weight:g}" for names, weight in pairs)

    @property
    def criteria(self) -> tuple[str, ...]:
        """All criteria of its calls."""
        return tuple(dict.fromkeys(name for names in self.kinds for name in names))

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse text such as `color:3,shape:1,color+shape:1`.

        Raises:
            InvalidInputError: If the text has another form.
        """
        kinds, weights = [], []
        for part in text.split(","):
            named, _, weight = part.rpartition(":")
            kinds.append(tuple(name.strip() for name in named.split("+")))
            try:
                weights.append(float(weight))
            except ValueError:
                weights.append(0.0)
        known = all(all(names) and len(set(names)) == len(names) for names in kinds)
        if not known or len(set(kinds)) < len(kinds) or not all(0 < w < 1e9 for w in weights):
            raise InvalidInputError(
                "--mix: expected different criteria with weights, such as "
                f"color:3,shape:1,color+shape:1; got {text!r}"
            )
        return cls(tuple(kinds), tuple(weights))

    def draw(self, seed: int) -> list[tuple[str, ...]]:
        """Return the criteria of the first calls of a run. The same seed gives the same ones."""
        return random.Random(seed).choices(self.kinds, self.weights, k=_DRAWN)


@dataclass(frozen=True, slots=True)
class TracedCall:
    """A call of a trace.

    Attributes:
        due: When it is due, in seconds since the first call of the trace.
        counts: Whether its latency counts: it does not belong to a warm-up.
        call: What it asks for.
    """

    due: float
    counts: bool
    call: Call


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace.

    Attributes:
        path: Its file.
        calls: Its calls, in the order in which they are due.
        warm_up: Seconds until the first call that counts.
        seconds: Seconds from there to the last call.
    """

    path: Path
    calls: tuple[TracedCall, ...]
    warm_up: float
    seconds: float

    @property
    def criteria(self) -> tuple[str, ...]:
        """All criteria of its calls."""
        return tuple(dict.fromkeys(name for each in self.calls for name in each.call.criteria))

    @property
    def most_images(self) -> int:
        """Largest number of images of a call."""
        return max(each.call.images for each in self.calls)


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a record. The other keys that `--requests` writes are not needed."""

    due_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    images: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    criteria: tuple[str, ...] = ()
    phase: Literal["warm_up", "measured", "late"] = "measured"


def read_trace(path: Path, *, speed: float = 1.0) -> Trace:
    """Read a trace that `crl bench --requests` wrote as JSON lines, or that somebody else made.

    Args:
        path: File of the trace. Each line needs `due_seconds` only. A call has one image and no
            criteria unless its line says more.
        speed: Factor by which the calls come faster than recorded.

    Raises:
        InvalidInputError: If the file cannot be read, or a line is none of a trace.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidInputError(
            f"--replay: {path}: cannot be read ({error.strerror}); record calls with "
            "crl bench --requests"
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            raw = decode_json(line) if line.strip() else None
            if raw is None or (number == 1 and _is_header(raw)):
                continue
            found.append(msgspec.convert(raw, _Line))
        except msgspec.MsgspecError as error:
            raise InvalidInputError(
                f"--replay: {path}: line {number}: expected a JSON object with due_seconds, images "
                f"and criteria, as crl bench --requests writes it; got {_quote(line)} ({error})"
            ) from error
    counting = [line.due_seconds for line in found if line.phase != "warm_up"]
    if not counting:
        raise InvalidInputError(
            f"--replay: {path}: expected calls that count, got {len(found)} calls, all of a "
            "warm-up; record calls with crl bench --requests"
        )
    first = min(line.due_seconds for line in found)
    calls = [
        TracedCall(
            (line.due_seconds - first) / speed,
            line.phase != "warm_up",
            Call(line.images, line.criteria),
        )
        for line in sorted(found, key=lambda line: line.due_seconds)
    ]
    return Trace(
        path=path,
        calls=tuple(calls),
        warm_up=(min(counting) - first) / speed,
        seconds=max((max(counting) - min(counting)) / speed, _SHORTEST),
    )


def _is_header(raw: Any) -> bool:
    """Return whether this is the header of a file of records.

    Raises:
        msgspec.ValidationError: If it is that of another schema.
    """
    if not isinstance(raw, dict) or "schema" not in raw:
        return False
    if raw["schema"] != SCHEMA:
        raise msgspec.ValidationError(f"schema {raw['schema']}, this SDK reads {SCHEMA}")
    return True


def _quote(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
