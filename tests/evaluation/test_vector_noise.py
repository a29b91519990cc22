"""Texts with others mixed in: what is added, and what the methods still get as background."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._vector_noise import mix_in

OWN, OTHER, GENERIC = (np.full((n, 4), value, np.float32) for n, value in ((7, 1), (5, 2), (9, 3)))
GENERIC = GENERIC + np.arange(9, dtype=np.float32)[:, None] / 100


def test_half_as_many_texts_are_added():
    assert mix_in(OWN, "clean", [OTHER], GENERIC) == (OWN, GENERIC)
    texts, background = mix_in(OWN, "other-criteria", [OTHER, OTHER], GENERIC)
    np.testing.assert_array_equal(texts, np.concatenate([OWN, OTHER[:3]]))
    assert background is GENERIC
    texts, background = mix_in(OWN, "off-topic", [OTHER], GENERIC)
    assert len(texts) == 10 and len(background) == 6
    taken_and_left = np.concatenate([texts[7:], background])  # nothing is in both
    np.testing.assert_array_equal(np.sort(taken_and_left, axis=0), GENERIC)
    again, _ = mix_in(OWN, "off-topic", [OTHER], GENERIC, seed=1)
    assert not np.array_equal(again, texts)
    assert len(mix_in(OWN[:2], "off-topic", [], GENERIC)[0]) == 4


@pytest.mark.parametrize(("noise", "needed"), [("off-topic", 4), ("other-criteria", 3)])
def test_too_few_texts_to_take(noise, needed):
    mix_in(OWN, noise, [OTHER[:needed]], GENERIC[:needed])
    with pytest.raises(InvalidInputError, match=f"--noise {noise}: expected at least {needed}"):
        mix_in(OWN, noise, [OTHER[: needed - 1]], GENERIC[: needed - 1])
    with pytest.raises(InvalidInputError, match="there are 0"):
        mix_in(OWN, noise, [], None)
