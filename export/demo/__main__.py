"""`python -m crl_export.demo build DIR` trains and exports the demo model; `evaluate` measures one.

`build` leaves DIR/checkpoint (open_clip's format), DIR/bundle (what ships as
crl_sdk/bundles/demo) and DIR/evaluation.json. `evaluate` prints the same table for any bundle.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_export.demo.captions import CODES, NEUTRAL_PROMPT
from crl_export.demo.dataset import write_dataset
from crl_export.demo.evaluate import Row, as_table, evaluate
from crl_export.demo.world import CRITERIA, FACTORS
from crl_sdk import Embedder, demo_bundle

HELD_OUT_SEED = 2  # train.TEST_DATA_SEED, which lies behind torch


def build(directory: Path) -> None:
    """Train, export, measure: under an hour on two cores.

    Args:
        directory: made if missing; receives `checkpoint/`, `bundle/` and `evaluation.json`.
    """
    from crl_export.demo.train import Settings, train
    from crl_export.exporter import export_model

    train(directory / "checkpoint", Settings())
    export_model(
        str(directory / "checkpoint"), out=directory / "bundle", name="crl-demo", overwrite=True
    )
    rows = evaluate_bundle(directory / "bundle")
    record = {"prompt": NEUTRAL_PROMPT, "clustering": [asdict(row) for row in rows]}
    (directory / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    print(as_table(rows))
    print(f"to ship it: cp {directory}/bundle/* crl_sdk/bundles/demo/")


def evaluate_bundle(bundle: Path, *, images: int = 3000, seed: int = HELD_OUT_SEED) -> list[Row]:
    """Measure a bundle on held-out scenes, from JPEG files on, as a user would run it.

    Args:
        bundle: a model bundle.
        images: number of scenes.
        seed: of the data set; the demo model was trained on seed 1.

    Returns:
        One row per criterion.
    """
    with tempfile.TemporaryDirectory() as scratch, Embedder.open(bundle) as embedder:
        table = write_dataset(Path(scratch), images, seed)
        codes = read_codes(table)
        files = sorted((table.parent / "images").iterdir())
        return evaluate(
            embedder.embed(files).universal,
            embedder.embed_text,
            {criterion: codes[:, CODES[criterion]] for criterion in CRITERIA},
        )


def read_codes(table: Path) -> NDArray[np.int64]:
    """Read `labels.csv` as value indices, (n, number of factors), in the order of the files."""
    with table.open(newline="") as file:
        scenes = list(csv.DictReader(file))
    return np.array(
        [[FACTORS[name].index(scene[name]) for name in FACTORS] for scene in scenes], np.int64
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("directory", type=Path)
    measure = commands.add_parser("evaluate")
    measure.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    measure.add_argument("-n", type=int, default=3000, help="held-out scenes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "build":
        build(arguments.directory)
    else:
        print(as_table(evaluate_bundle(arguments.bundle, images=arguments.n)))


if __name__ == "__main__":
    main()
