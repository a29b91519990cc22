"""Shows the demo model its own scenes, so that it can tell other images apart."""

from __future__ import annotations

import tempfile
from pathlib import Path

from crl_export.bundle_files import put_file
from crl_export.demo.dataset import MONITOR_SEED, read_labels, write_dataset
from crl_sdk import Embedder
from crl_sdk.model._familiar_images import (
    FAMILIAR_IMAGES_FILE,
    FamiliarImages,
    encode_familiar_images,
)

SCENES = 2000
SUBJECT = "rendered scenes of coloured shapes"
LIMIT = 8.0
"""Median distance above which images are not scenes. In 99 of 100 draws of five images, scenes were
below 7.4; and photographs, crops of them, icons and diagrams were above 8.4."""


def add_familiar_images(directory: Path) -> None:
    """Embed scenes with a bundle and store their mean and covariance in it."""
    with tempfile.TemporaryDirectory() as scratch, Embedder.open(directory) as embedder:
        files, _ = read_labels(write_dataset(Path(scratch), SCENES, MONITOR_SEED))
        familiar = FamiliarImages.fit(embedder.embed(files).universal, subject=SUBJECT, limit=LIMIT)
        put_file(embedder.bundle, FAMILIAR_IMAGES_FILE, encode_familiar_images(familiar))
