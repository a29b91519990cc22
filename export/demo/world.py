"""The demo world: its factors, their values, and the description of a scene.

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
"""Values of each factor. The order of factors and values is part of the data format."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Position of one object: centre and radius as shares of the image's side, angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Description of a scene. It determines every pixel.

    Attributes:
        values: Value of each factor of `FACTORS`.
        placements: Position of each object, in painting order; their number is the count.
        seed: Seed of what the factors do not determine: tints, light, phase of the texture.
    """

    values: Mapping[str, str]
    placements: tuple[Placement, ...]
    seed: int

    def codes(self) -> tuple[int, ...]:
        """Return the index of each factor's value, in the order of `FACTORS`."""
        return tuple(values.index(self.values[name]) for name, values in FACTORS.items())
