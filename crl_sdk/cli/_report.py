"""The report: pictures in their groups, as a PNG and as an HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from crl_sdk.cli._report_groups import Group, Panel

THUMB = 64
"""Side of a thumbnail in pixels."""

_FRAME = "A red frame: a picture whose label is not its group's."
_NEAREST = "Of each group the pictures nearest to its centre, copies once."
_EDGE = (
    f"{_NEAREST[:-1]}; behind the line the farthest. Cosine: of two of its pictures, on average."
)
_ROWS, _COLUMNS = 8, 8
_GAP, _MARGIN, _NAME = 4, 28, 150
_SIDE = _NAME + _COLUMNS * (THUMB + _GAP)
_INK, _DIM, _WRONG, _PAPER = "#1c1c1e", "#6b6b70", "#d9483b", "#ffffff"


def write_png(path: Path, title: str, panels: Sequence[Panel], files: Sequence[Path]) -> None:
    """Draw every criterion: on the left the universal groups, on the right the conditional ones.

    Args:
        path: to write.
        title: above all.
        panels: one per criterion.
        files: the pictures that groups name by position.
    """
    heights = [_panel_height(panel) for panel in panels]
    width = 2 * _SIDE + 3 * _MARGIN
    sheet = Image.new("RGB", (width, 70 + sum(heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 20), title, _INK, ImageFont.load_default(24))
    said = _FRAME if any(panel.accuracies for panel in panels) else _NEAREST
    draw.text((2 * _MARGIN + _SIDE, 28), said, _DIM, ImageFont.load_default(14))
    top = 70
    for panel, height in zip(panels, heights, strict=True):
        draw.line((_MARGIN, top, width - _MARGIN, top), "#d8d8dc", 2)
        draw.text((_MARGIN, top + 12), f"“{panel.criterion}”", _INK, ImageFont.load_default(26))
        words = ", ".join(panel.texts)
        draw.text(
            (_MARGIN + _SIDE + _MARGIN, top + 20), _cut(f"{_author(panel)}: {words}", 88), _DIM,
            ImageFont.load_default(14),
        )  # fmt: skip
        sides = ((panel.universal, "universal embedding"), (panel.conditional, "conditional"))
        for side, (groups, name) in enumerate(sides):
            left = _MARGIN + side * (_SIDE + _MARGIN)
            heading = name + _accuracy(panel, side)
            draw.text((left, top + 48), heading, _INK, ImageFont.load_default(18))
            _draw_groups(sheet, draw, (left, top + 80), groups, files)
        top += height
    sheet.save(path, optimize=True)


def write_html(path: Path, title: str, panels: Sequence[Panel], files: Sequence[Path]) -> None:
    """Write the same as a page, thumbnails inside; the arguments are those of `write_png`."""
    parts = [_HEAD.format(title=html.escape(title))]
    if any(panel.accuracies for panel in panels):
        parts.append(f"<p>{_FRAME}</p>")
    if any(group.edge for panel in panels for group in panel.conditional):
        parts.append(f"<p>{_EDGE}</p>")
    seen: dict[int, str] = {}
    for panel in panels:
        words = html.escape(", ".join(panel.texts))
        parts.append(f"<section><h2>“{html.escape(panel.criterion)}”</h2>")
        parts.append(f"<p>{_author(panel)}: {words}</p>")
        if panel.remark:
            parts.append(f"<p>{html.escape(panel.remark)}</p>")
        parts += [f"<p class=doubt>Doubt: {html.escape(doubt)}.</p>" for doubt in panel.doubts]
        parts.append("<div class=sides>")
        sides = ((panel.universal, "universal embedding"), (panel.conditional, "conditional"))
        for side, (groups, name) in enumerate(sides):
            parts.append(f"<div><h3>{name}{_accuracy(panel, side)}</h3>")
            for group in groups:
                told = f"<b>{html.escape(group.name)}</b><br>{html.escape(_told(group))}"
                parts.append(f"<div class=group><span>{told}</span><div class=pictures>")
                for place, picture in enumerate((*group.pictures, *group.edge)):
                    if place == len(group.pictures):
                        parts.append("</div><div class='pictures edge'>")
                    data = seen.setdefault(picture, _data_uri(files[picture]))
                    wrong = place < len(group.fitting) and not group.fitting[place]
                    mark = " class=wrong" if wrong else ""
                    hover = html.escape(files[picture].name)
                    parts.append(f"<img{mark} src='{data}' alt='' title='{hover}'>")
                parts.append("</div></div>")
            parts.append("</div>")
        parts.append("</div></section>")
    path.write_text("\n".join(parts), encoding="utf-8", errors="replace")


def _draw_groups(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    groups: Sequence[Group],
    files: Sequence[Path],
) -> None:
    left, top = corner
    for row, group in enumerate(groups[:_ROWS]):
        y = top + row * (THUMB + _GAP)
        draw.text((left, y + 14), _cut(group.name, 15), _INK, ImageFont.load_default(17))
        draw.text((left, y + 36), _told(group), _DIM, ImageFont.load_default(13))
        for column, picture in enumerate(group.pictures[:_COLUMNS]):
            x = left + _NAME + column * (THUMB + _GAP)
            sheet.paste(_thumbnail(files[picture]), (x, y))
            if group.fitting and not group.fitting[column]:
                draw.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), outline=_WRONG, width=3)
    if len(groups) > _ROWS:
        y = top + _ROWS * (THUMB + _GAP)
        draw.text((left, y), f"… and {len(groups) - _ROWS} more", _DIM, ImageFont.load_default(14))


def _panel_height(panel: Panel) -> int:
    groups = max(len(panel.universal), len(panel.conditional))
    return 80 + min(groups, _ROWS) * (THUMB + _GAP) + (24 if groups > _ROWS else 0) + 20


def _author(panel: Panel) -> str:
    return "the language model's texts" if panel.written else "given texts"


def _accuracy(panel: Panel, side: int) -> str:
    return "" if panel.accuracies is None else f": {panel.accuracies[side]:.0%} in the right group"


def _told(group: Group) -> str:
    pure = "" if group.purity is None else f", {group.purity:.0%} fit"
    close = "" if group.cohesion is None else f", cosine {group.cohesion:.2f}"
    return f"{group.size} picture{'s' * (group.size != 1)}{pure}{close}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _thumbnail(file: Path) -> Image.Image:
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return ImageOps.fit(upright, (THUMB, THUMB), Image.Resampling.BICUBIC)


def _data_uri(file: Path) -> str:
    buffer = io.BytesIO()
    _thumbnail(file).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_HEAD = """<!doctype html><meta charset=utf-8><title>{title}</title>
<style>
body {{ font: 15px system-ui, sans-serif; color: #1c1c1e; margin: 2rem; }}
section {{ border-top: 2px solid #d8d8dc; padding: 0 0 1rem; }}
h2 {{ margin: .8rem 0 0; }} h3 {{ font-size: 1rem; }} p {{ color: #6b6b70; margin: .2rem 0; }}
p.doubt {{ color: #b3261e; }}
.sides {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(34rem, 1fr)); gap: 2rem; }}
.group {{ display: flex; align-items: center; gap: 8px; padding: 8px 0;
  border-bottom: 1px solid #ececf0; }}
.pictures {{ display: flex; flex: 1; flex-wrap: wrap; gap: 4px; }}
.edge {{ flex: 0 0 132px; border-left: 3px solid #d8d8dc; padding-left: 8px; }}
.group span {{ flex: 0 0 9rem; font-size: .85rem; color: #6b6b70; }}
.group b {{ font-size: 1rem; color: #1c1c1e; }}
img {{ width: 64px; height: 64px; }}
img.wrong {{ outline: 3px solid #d9483b; outline-offset: -3px; }}
</style>
<h1>{title}</h1>"""
