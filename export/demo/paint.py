"""The painter's materials: outlines of the shapes, patterns of the textures, tints, backdrops.

Coordinates `u`, `v` are in units of the object's radius, with the origin at its centre.
"""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Pattern = Callable[[Floats, Floats, np.random.Generator], Floats]

OUTLINE_AREA = 2.2
"""Area of every outline in squared radii, so that ink alone does not give the shape away."""

_TAU = 2 * np.pi
_PERIOD = 0.52
_TINTS = {  # hue, saturation, value
    "red": (0.995, 0.88, 0.84),
    "orange": (0.075, 0.92, 0.97),
    "yellow": (0.145, 0.85, 0.97),
    "green": (0.35, 0.78, 0.62),
    "blue": (0.61, 0.82, 0.85),
    "purple": (0.775, 0.68, 0.66),
    "pink": (0.925, 0.42, 0.98),
    "brown": (0.065, 0.68, 0.42),
    "black": (0.65, 0.15, 0.10),
    "white": (0.12, 0.03, 0.97),
}
_BACKDROPS = {  # two mid tones the backdrop runs between; every object colour stands out
    "studio": ((0.48, 0.48, 0.50), (0.64, 0.64, 0.65)),
    "sand": ((0.66, 0.60, 0.48), (0.76, 0.70, 0.58)),
    "sky": ((0.48, 0.62, 0.72), (0.66, 0.76, 0.80)),
    "grass": ((0.44, 0.54, 0.38), (0.56, 0.64, 0.46)),
    "wood": ((0.55, 0.45, 0.36), (0.68, 0.57, 0.46)),
    "concrete": ((0.40, 0.42, 0.45), (0.54, 0.56, 0.58)),
}


def outline(shape: str) -> Floats:
    """Return the closed outline of a shape.

    Args:
        shape: One of `world.SHAPES`.

    Returns:
        Polygon vertices, (m, 2) float32, centred, of area `OUTLINE_AREA`.
    """
    turn = np.linspace(0, _TAU, 48, endpoint=False)
    if shape == "circle":
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "oval":
        points = np.stack([np.cos(turn), 0.52 * np.sin(turn)], 1)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "rectangle":
        points = np.array([(-1, -0.48), (1, -0.48), (1, 0.48), (-1, 0.48)])
    elif shape == "triangle":
        corner = _TAU * np.arange(3) / 3
        points = np.stack([np.cos(corner), np.sin(corner)], 1)
    elif shape == "star":
        corner = _TAU * np.arange(10) / 10
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.47)
        points = np.stack([reach * np.cos(corner), reach * np.sin(corner)], 1)
    elif shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([x, -y], 1)
    elif shape == "cross":
        a = 0.36
        points = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
             (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )  # fmt: skip
    elif shape == "crescent":
        outer = np.linspace(0.62, _TAU - 0.62, 40)
        inner = np.linspace(_TAU - 0.98, 0.98, 32)
        bite = np.stack([0.42 + 0.7 * np.cos(inner), 0.7 * np.sin(inner)], 1)
        points = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), bite])
    elif shape == "arrow":
        points = np.array(
            [(1, 0), (0.1, 0.8), (0.1, 0.34), (-1, 0.34), (-1, -0.34), (0.1, -0.34), (0.1, -0.8)]
        )
    else:
        raise ValueError(f"expected one of world.SHAPES, got {shape!r}")
    x, y = points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    middle = (points.max(0) + points.min(0)) / 2
    scaled: Floats = ((points - middle) * np.sqrt(OUTLINE_AREA / area)).astype(np.float32)
    return scaled


def _wave(t: Floats) -> Floats:
    """Triangle wave of period 1 between -1 and 1."""
    return np.asarray(4 * np.abs(t - np.floor(t + 0.5)) - 1, np.float32)


def _bars(t: Floats, share: float = 0.5) -> Floats:
    """Bars of period `_PERIOD`, of which `share` is marked."""
    return np.asarray((t / _PERIOD) % 1.0 < share, np.float32)


def _dotted(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    row = np.floor(v / _PERIOD)
    du = (u / _PERIOD + 0.5 * (row % 2)) % 1.0 - 0.5
    dv = (v / _PERIOD) % 1.0 - 0.5
    return np.asarray(du * du + dv * dv < 0.1, np.float32)


def _checkered(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray((np.floor(u / 0.4) + np.floor(v / 0.4)) % 2, np.float32)


def _grid(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.asarray(np.maximum(_bars(u, 0.27), _bars(v, 0.27)), np.float32)


def _speckled(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    grains = rng.random((24, 24)) < 0.4
    column = np.clip((u + 1.7) / 3.4 * 24, 0, 23).astype(np.intp)
    row = np.clip((v + 1.7) / 3.4 * 24, 0, 23).astype(np.intp)
    return np.asarray(grains[row, column], np.float32)


def _ringed(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return _bars(np.asarray(np.hypot(u, v), np.float32))


def _marbled(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    a, b, c, d = rng.uniform(0, _TAU, 4)
    vein = np.sin(3.4 * u + a + 1.6 * np.sin(2.3 * v + b))
    vein += np.sin(3.7 * v + c + 1.6 * np.sin(2.6 * u + d))
    return np.asarray(vein > 0.15, np.float32)


_PATTERNS: dict[str, Pattern] = {
    "plain": lambda u, v, rng: np.zeros_like(u),
    "striped": lambda u, v, rng: _bars(u),
    "dotted": _dotted,
    "checkered": _checkered,
    "zigzag": lambda u, v, rng: _bars(np.asarray(v + 0.24 * _wave(u * 1.25), np.float32)),
    "grid": _grid,
    "speckled": _speckled,
    "ringed": _ringed,
    "gradient": lambda u, v, rng: np.clip(0.5 + 0.62 * u, 0, 1),
    "marbled": _marbled,
}


def pattern(texture: str, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Return how strongly each point is marked.

    Args:
        texture: One of `world.TEXTURES`.
        u: Horizontal coordinates in radii, (h, w) float32.
        v: Vertical coordinates in radii, (h, w) float32.
        rng: Source of the angle and phase.

    Returns:
        (h, w) float32 in [0, 1]: 0 is the object's colour, 1 the tone of its marks.
    """
    angle = rng.uniform(0, _TAU)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    shift = (0.0, 0.0) if texture in ("ringed", "gradient") else rng.uniform(-1, 1, 2)
    turned_u = cos * u - sin * v + np.float32(shift[0])
    turned_v = sin * u + cos * v + np.float32(shift[1])
    return _PATTERNS[texture](turned_u, turned_v, rng)


def tints(colour: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the tint of a scene's objects and the tone of their marks, two (3,) float32."""
    hue, saturation, value = _TINTS[colour]
    hue = (hue + rng.uniform(-0.014, 0.014)) % 1.0
    saturation = float(np.clip(saturation + rng.uniform(-0.07, 0.07), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.05, 0.05), 0, 1))
    body = np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    darker = colour == "white" or (colour != "black" and rng.random() < 0.5)
    if darker:
        marks = body * np.float32(0.6 if colour == "white" else 0.38)
    else:
        marks = body + (1 - body) * np.float32(0.55 if colour == "black" else 0.62)
    return body, np.asarray(marks, np.float32)


def backdrop(background: str, side: int, rng: np.random.Generator) -> Floats:
    """Return a backdrop.

    Args:
        background: One of `world.BACKGROUNDS`.
        side: Width and height in pixels.
        rng: Source of the tone, the gradient's direction and the grain.

    Returns:
        (side, side, 3) float32 in [0, 1].
    """
    first, second = (np.array(tone, np.float32) for tone in _BACKDROPS[background])
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    angle = rng.uniform(0, _TAU)
    across, down = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    blend = 0.5 + across * axis[None, :] + down * axis[:, None]
    # (columns, rows) of the noise: streaks run along the axis with fewer cells
    cells = {"sky": (5, 5), "grass": (48, 48), "wood": (4, 40), "concrete": (14, 14)}
    columns, rows = cells.get(background, (64, 64))
    if rng.random() < 0.5:
        columns, rows = rows, columns
    noise = Image.fromarray(rng.random((rows, columns), np.float32), "F")
    grain = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    weight = {"studio": 0.05, "sand": 0.3}.get(background, 0.5)
    blend = np.clip(blend * (1 - weight) + grain * weight, 0, 1)[..., None]
    tone = np.float32(rng.uniform(0.9, 1.08))
    return np.asarray((first + (second - first) * blend) * tone, np.float32)
