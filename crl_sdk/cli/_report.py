"""Write a report: groups of images as one HTML file that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from crl_sdk.cli._report_content import ReportSection
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically

THUMBNAIL_SIDE = 64
"""Side of a thumbnail, in pixels."""

_TEMPLATE = "report.html.jinja"


def write_report(
    path: Path,
    title: str,
    sections: Sequence[ReportSection],
    files: Sequence[Path],
    *,
    model: str,
    warning: str | None = None,
) -> None:
    """Write a report.

    Each image is encoded once, however often the page shows it.

    Args:
        path: HTML file to write.
        title: Title of the page.
        sections: Sections of the page, one per criterion.
        files: Image files. The groups of `sections` refer to them by position.
        model: Name of the model.
        warning: Warning about the whole report, or None.

    Raises:
        InvalidInputError: If the file cannot be written.
        ModuleNotFoundError: If Jinja2 is not installed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    groups = [group for section in sections for group in (*section.universal, *section.conditional)]
    shown = sorted({position for group in groups for position in (*group.images, *group.edge)})
    environment = Environment(
        loader=PackageLoader("crl_sdk.cli", ""),
        autoescape=True,  # file names and texts come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        title=title,
        model=model,
        warning=warning,
        sections=sections,
        labelled=any(section.accuracies is not None for section in sections),
        with_edge=any(group.edge for group in groups),
        names={position: files[position].name for position in shown},
        thumbnails={position: _data_uri(files[position]) for position in shown},
        side=THUMBNAIL_SIDE,
        percent="{:.0%}".format,
    )
    # A file name may hold bytes that are not UTF-8.
    write_atomically(path, page.encode("utf-8", "replace"), InvalidInputError)


def _data_uri(file: Path) -> str:
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        thumbnail = ImageOps.fit(
            upright, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC
        )
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
