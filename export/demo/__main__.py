"""Train and export the demo model, or measure a bundle.

`python -m crl_export.demo build DIR` writes DIR/crl-demo (open_clip's format), DIR/bundle (the
content of crl_sdk/bundles/demo) and DIR/evaluation.json. `python -m crl_export.demo evaluate`
prints the table of accuracies for a bundle. `python -m crl_export.demo familiar BUNDLE` makes the
statistics of the model's own scenes again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from crl_export.demo.captions import NEUTRAL_PROMPT, background_captions
from crl_export.demo.dataset import TEST_SEED, labels_of, read_labels, write_dataset
from crl_export.demo.evaluate import Row, as_table, evaluate
from crl_export.demo.familiar import add_familiar_images
from crl_sdk import Embedder, demo_bundle


def build(directory: Path) -> None:
    """Train, export and measure the demo model, which takes less than an hour on two cores.

    Args:
        directory: Directory, created if missing. It receives `crl-demo/`, `bundle/` and
            `evaluation.json`.
    """
    from crl_export.demo.train import TrainingSettings, train
    from crl_export.exporter import export_model

    train(directory / "crl-demo", TrainingSettings())
    export_model(
        str(directory / "crl-demo"),
        out=directory / "bundle",
        name="crl-demo",
        license="Apache-2.0",
        background=background_captions(),
        prompt="{}",  # it was trained on bare words too
        overwrite=True,
    )
    add_familiar_images(directory / "bundle")
    rows = evaluate_bundle(directory / "bundle")
    record = {"prompt": NEUTRAL_PROMPT, "clustering": [asdict(row) for row in rows]}
    (directory / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    print(as_table(rows))
    print(f"to ship it: cp {directory}/bundle/* crl_sdk/bundles/demo/")


def evaluate_bundle(bundle: Path, *, images: int = 3000, seed: int = TEST_SEED) -> list[Row]:
    """Measure a bundle on JPEG files of held-out scenes, as a user would run it.

    Args:
        bundle: Directory of the bundle.
        images: Number of scenes.
        seed: Seed of the data set. The default is that of the demo model's test scenes.

    Returns:
        One row per criterion.
    """
    with tempfile.TemporaryDirectory() as scratch, Embedder.open(bundle) as embedder:
        table = write_dataset(Path(scratch), images, seed)
        files, codes = read_labels(table)
        universal = embedder.embed(files).universal
        return evaluate(universal, embedder.embed_text, labels_of(codes))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("directory", type=Path)
    measure = commands.add_parser("evaluate")
    measure.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    measure.add_argument("-n", type=int, default=3000, help="held-out scenes")
    familiar = commands.add_parser("familiar", help="store what the model's own scenes look like")
    familiar.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "build":
        build(arguments.directory)
    elif arguments.command == "familiar":
        add_familiar_images(arguments.bundle)
    else:
        print(as_table(evaluate_bundle(arguments.bundle, images=arguments.n)))


if __name__ == "__main__":
    main()
