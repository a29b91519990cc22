"""Sample scenes of the demo world and render them; the same seed gives the same pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from crl_export.demo import paint
from crl_export.demo.world import BACKGROUNDS, COLOURS, COUNTS, SHAPES, TEXTURES, Placement, Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_SIDE = 128
"""Width and height of a rendered image in pixels."""

JPEG_QUALITY = 90

_SUPERSAMPLING = 2
_MIN_RADIUS = 0.108
_PLACING_TRIES = 60
_REACH = 1.45  # the farthest any outline gets from its centre, in radii


def sample_scene(seed: int, **fixed: str) -> Scene:
    """Draw a scene. Each factor except `size` is uniform and independent of the others.

    Args:
        seed: Non-negative integer. Equal seeds and equal `fixed` give equal scenes.
        **fixed: Values of factors to fix, such as `shape="star", count="7"`. `size` cannot be
            fixed, since it follows from the drawn radius.

    Raises:
        KeyError: If `fixed` names anything but a factor that can be fixed.
    """
    rng = np.random.default_rng([seed, 0x5CE4E])
    values = {
        "shape": str(rng.choice(SHAPES)),
        "colour": str(rng.choice(COLOURS)),
        "texture": str(rng.choice(TEXTURES)),
        "count": str(rng.choice(COUNTS)),
        "background": str(rng.choice(BACKGROUNDS)),
    }
    for name, value in fixed.items():
        if name not in values:
            raise KeyError(f"expected one of {', '.join(values)}, got {name!r}")
        values[name] = value
    placements = _place(int(values["count"]), rng)
    typical = float(np.mean([p.radius for p in placements]))
    values["size"] = "small" if typical < 0.135 else "medium" if typical < 0.19 else "large"
    return Scene(values, placements, seed)


def _place(count: int, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Scatter objects so that they may touch or overlap a little but never hide each other."""
    radius = rng.uniform(_MIN_RADIUS, min(0.29, 0.43 / np.sqrt(count)))
    spread = rng.uniform(1.5, 1.95)
    while True:
        placed: list[Placement] = []
        for _ in range(_PLACING_TRIES * count):
            own = radius * rng.uniform(0.9, 1.1)
            x, y = rng.uniform(own, 1 - own, 2)
            if all(np.hypot(x - p.x, y - p.y) > spread * (own + p.radius) / 2 for p in placed):
                placed.append(Placement(x, y, own, rng.uniform(0, 2 * np.pi)))
                if len(placed) == count:
                    return tuple(placed)
        radius = max(radius * 0.96, 0.95 * _MIN_RADIUS)
        spread = max(spread * 0.98, 1.45)


def render_scene(scene: Scene, side: int = IMAGE_SIDE) -> NDArray[np.uint8]:
    """Paint a scene.

    Args:
        scene: What to paint.
        side: Width and height in pixels.

    Returns:
        RGB, (side, side, 3) uint8.
    """
    rng = np.random.default_rng([scene.seed, 0x9A147])
    canvas = paint.backdrop(scene.values["background"], side * _SUPERSAMPLING, rng)
    body, marks = paint.tints(scene.values["colour"], rng)
    look = _Look(
        outline=paint.outline(scene.values["shape"]),
        texture=scene.values["texture"],
        body=body,
        marks=marks,
        light=rng.uniform(0, 2 * np.pi),
        relief=rng.uniform(0.06, 0.2),
    )
    for placement in scene.placements:
        _paint_object(canvas, look, placement, rng)
    canvas *= np.float32(rng.uniform(0.88, 1.06))
    pixels = Image.fromarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(pixels.reduce(_SUPERSAMPLING))


@dataclass(frozen=True, slots=True)
class _Look:
    """What the objects of a scene share.

    Attributes:
        outline: (m, 2) float32, in radii.
        texture: One of `world.TEXTURES`.
        body: RGB of the object, (3,) float32.
        marks: RGB of the texture's marks, (3,) float32.
        light: Direction the light comes from, in radians.
        relief: How much brighter the lit side is than the middle.
    """

    outline: NDArray[np.float32]
    texture: str
    body: NDArray[np.float32]
    marks: NDArray[np.float32]
    light: float
    relief: float


def _paint_object(
    canvas: NDArray[np.float32], look: _Look, placement: Placement, rng: np.random.Generator
) -> None:
    """Paint one object onto `canvas` (side, side, 3) in place: its shadow, then itself."""
    side = canvas.shape[0]
    unit = placement.radius * side
    half = int(np.ceil(unit * _REACH))
    axis = np.arange(-half, half + 1, dtype=np.float32) / np.float32(unit)
    u, v = np.broadcast_arrays(axis[None, :], axis[:, None])

    cos, sin = np.cos(placement.angle), np.sin(placement.angle)
    turned = look.outline @ np.array([[cos, sin], [-sin, cos]], np.float32) * unit
    mask = _fill(turned + half, 2 * half + 1)
    inside_rim = _fill(turned * 0.9 + half, 2 * half + 1)

    strength = paint.pattern(look.texture, u, v, rng)[..., None]
    colour = look.body + (look.marks - look.body) * strength
    toward_light = np.float32(np.cos(look.light)) * u + np.float32(np.sin(look.light)) * v
    shade = 1 + np.float32(look.relief) * np.clip(toward_light, -1, 1)
    shade *= np.float32(0.72) + np.float32(0.28) * inside_rim
    colour = colour * shade[..., None]

    soft = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(unit * 0.12))
    shadow = np.asarray(soft, np.float32) * np.float32(0.4 / 255)
    left, top = int(placement.x * side) - half, int(placement.y * side) - half
    drop = unit * 0.13
    dx, dy = int(-np.cos(look.light) * drop), int(-np.sin(look.light) * drop)
    _blend(canvas, np.zeros_like(colour), shadow, left + dx, top + dy)
    _blend(canvas, colour, mask, left, top)


def _fill(polygon: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return the polygon's mask, (side, side) float32, 0 or 1."""
    mask = Image.new("1", (side, side))
    ImageDraw.Draw(mask).polygon(polygon.ravel().tolist(), fill=1)
    return np.asarray(mask, np.float32)


def _blend(
    canvas: NDArray[np.float32],
    colour: NDArray[np.float32],
    alpha: NDArray[np.float32],
    left: int,
    top: int,
) -> None:
    """Lay `colour` (h, w, 3) over `canvas` in place with weight `alpha` (h, w), clipped to it."""
    side = canvas.shape[0]
    height, width = alpha.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    target = canvas[y0:y1, x0:x1]
    target += (colour[part] - target) * np.asarray(alpha[part], np.float32)[..., None]


def encode_scene(scene: Scene, side: int = IMAGE_SIDE) -> bytes:
    """Render a scene and return it as JPEG bytes (4:4:4, quality `JPEG_QUALITY`)."""
    buffer = io.BytesIO()
    image = Image.fromarray(render_scene(scene, side))
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
