"""What exists in the demo world: the factors, their values, and the record of one scene.

Every object of a scene shares shape, colour and texture; `count` says how many there are. These
four are the criteria to cluster by. `background` and `size` vary as well and are known, so that
captions can mention them, but nothing is measured on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SHAPES = (
    "circle", "oval", "square", "rectangle", "triangle",
    "star", "heart", "cross", "crescent", "arrow",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue",
    "purple", "pink", "brown", "black", "white",
)  # fmt: skip
TEXTURES = (
    "plain", "striped", "dotted", "checkered", "zigzag",
    "grid", "speckled", "ringed", "gradient", "marbled",
)  # fmt: skip
COUNTS = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10")
BACKGROUNDS = ("studio", "sand", "sky", "grass", "wood", "concrete")
SIZES = ("small", "medium", "large")

CRITERIA = ("shape", "colour", "texture", "count")
"""The factors that are measured, in the order of every table."""

FACTORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "texture": TEXTURES,
        "count": COUNTS,
        "background": BACKGROUNDS,
        "size": SIZES,
    }
)
"""Factor name → its values; the order of both is part of the data format."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One object: centre in units of the picture's side, radius in the same, angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene, fully determined: rendering it twice gives the same pixels.

    Attributes:
        values: factor name → value, one entry per factor of `FACTORS`.
        placements: one per object, painted in this order; `len(placements)` is the count.
        seed: seed of everything the factors leave open: tints, light, phase of the texture.
    """

    values: Mapping[str, str]
    placements: tuple[Placement, ...]
    seed: int

    def codes(self) -> tuple[int, ...]:
        """Return the index of each factor's value, in the order of `FACTORS`."""
        return tuple(values.index(self.values[name]) for name, values in FACTORS.items())
