"""Times at which the calls of an open loop are due: Poisson arrivals, with or without bursts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from crl_sdk.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Burst:
    """A rate that rises again and again. The first burst begins with the measured time.

    Attributes:
        factor: Factor of the rate during a burst.
        seconds: Seconds of a burst.
        every: Seconds between the beginnings of two bursts.
    """

    factor: float
    seconds: float
    every: float

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        return f"{self.factor:g}:{self.seconds:g}:{self.every:g}"

    @classmethod
    def parse(cls, text: str) -> Burst:
        """Parse text such as `4:2:10`: four times the rate for 2 in every 10 seconds.

        Raises:
            InvalidInputError: If the text has another form.
        """
        try:
            factor, seconds, every = map(float, text.split(":"))
            known = 0 < factor < math.inf and 0 < seconds < every < math.inf
        except ValueError:
            known = False
        if not known:
            raise InvalidInputError(
                "--burst: expected FACTOR:SECONDS:EVERY with fewer SECONDS than EVERY, such as "
                f"4:2:10 for four times the rate during 2 in every 10 seconds; got {text!r}"
            )
        return cls(factor, seconds, every)

    def _phase(self, after: float) -> tuple[float, float]:
        """Return the factor at a time, and the seconds until it changes."""
        inside = after % self.every
        if inside < self.seconds:
            return self.factor, self.seconds - inside
        return 1.0, self.every - inside

    def wait(self, after: float, rate: float, expected: float) -> float:
        """Return the seconds in which a number of calls is expected.

        Args:
            after: Time, in seconds since the beginning of a burst.
            rate: Calls per second between bursts.
            expected: Expected number of calls.
        """
        waited = 0.0
        while True:
            factor, left = self._phase(after + waited)
            if factor * rate * left >= expected:
                return waited + expected / (factor * rate)
            expected -= factor * rate * left
            waited += max(left, 1e-9)  # rounding must not make it stand still


def arrivals(
    rate: float, *, seed: int, warm_up: float = 0.0, burst: Burst | None = None
) -> Iterator[float]:
    """Yield the times at which calls are due, in seconds since the start of the warm-up.

    The calls between two moments are a Poisson process: with bursts, one whose rate changes.

    Args:
        rate: Calls per second, between bursts if there are any.
        seed: Seed of the times.
        warm_up: Seconds before the first burst, which begins with the measured time.
        burst: Bursts, or None for an even rate.
    """
    source, due = random.Random(seed), 0.0
    while True:
        if burst is None:
            due += source.expovariate(rate)
        else:
            due += burst.wait(due - warm_up, rate, source.expovariate(1.0))
        yield due
