"""Admission: room, deadlines, and the counts of images that never reach the engine."""

from __future__ import annotations

import time

import pytest

from crl_sdk.errors import DeadlineError, InvalidInputError, OverloadedError
from crl_sdk.serving._admission import Admission, DroppedImages, Pace, ServerLimits

LIMITS = ServerLimits(max_images=8, max_batch=4, max_queue=10)


def test_places_are_held_while_a_request_is_in_progress():
    admission = Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: 0)
    with admission.admit(8, None):
        assert admission.in_progress == 8
        with admission.admit(2, None):
            assert admission.in_progress == 10
        with (
            pytest.raises(OverloadedError, match=r"queue is full: 8 .* at most 10") as caught,
            admission.admit(3, None),
        ):
            pass
        assert caught.value.retry_after > 0
    assert admission.in_progress == 0
    assert admission.dropped == DroppedImages(rejected=3)


def test_abandoned_images_take_up_room_until_they_leave_the_queue():
    queued = 9
    admission = Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: queued)
    with pytest.raises(OverloadedError, match="9 images"), admission.admit(2, None):
        pass
    queued = 0
    with admission.admit(2, None):
        assert admission.in_progress == 2


def test_requests_that_would_be_late_are_refused():
    admission = Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: 0)
    with pytest.raises(DeadlineError, match="had passed"), admission.admit(1, time.monotonic()):
        pass
    admission._pace.learn(1, 30.0)
    with (
        admission.admit(4, None),
        pytest.raises(OverloadedError, match="the deadline is in"),
        admission.admit(4, time.monotonic() + 100),
    ):
        pass
    with admission.admit(4, time.monotonic() + 100):  # accepted: nothing else is in progress
        pass


def test_a_request_that_fails_gives_its_places_back():
    admission = Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: 0)
    for error in (DeadlineError("late"), ValueError("other")):
        with pytest.raises(type(error)), admission.admit(4, None):
            raise error
    assert admission.in_progress == 0


def test_dropped_images_are_counted_by_reason():
    admission = Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: 0)
    assert "after 250 ms" in str(admission.drop(cancelled=False, waited=0.25))
    admission.drop(cancelled=True, waited=0.0)
    assert admission.dropped == DroppedImages(expired=1, cancelled=1)


@pytest.mark.parametrize("count", [0, 9])
def test_the_size_of_a_request_is_bounded(count):
    with pytest.raises(InvalidInputError, match=f"expected 1 to 8 images in one call, got {count}"):
        Admission(LIMITS.max_images, LIMITS.max_queue, queued=lambda: 0).check_size(count)


def test_the_pace_follows_finished_requests():
    pace = Pace()
    assert pace.seconds_per_image == 0
    pace.learn(100, 1.0)
    assert pace.seconds_per_image == pytest.approx(0.01)
    pace.learn_at_least(100, 0.5)  # given up early, so it shows nothing
    assert pace.seconds_per_image == pytest.approx(0.01)
    pace.learn_at_least(100, 9.0)
    assert pace.seconds_per_image > 0.04
    for _ in range(100):
        pace.learn(10, 0.02)
    assert pace.seconds_per_image == pytest.approx(0.002, rel=0.01)


def test_inconsistent_limits_are_refused():
    with pytest.raises(InvalidInputError, match="max_queue 8 under max_batch 32"):
        ServerLimits(max_queue=8, max_images=8)
