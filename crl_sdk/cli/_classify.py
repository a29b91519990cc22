"""`crl classify`: learn classes from a few labelled images, and classify other images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, leave_out, out, print_facts, print_json, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    FormatsOption,
    OverwriteOption,
    ThreadsOption,
    require_new,
)
from crl_sdk.cli._sources import (
    BasisOption,
    CriterionOption,
    LazyEmbedder,
    PromptOption,
    TextsOption,
    read_label_table,
    require_same_model,
    require_tasks,
)
from crl_sdk.errors import ImageError, InvalidInputError
from crl_sdk.model._image_files import find_image_files
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.storage._checksummed_safetensors import SUFFIX
from crl_sdk.stored._reader import SUFFIXES as STORED_SUFFIXES
from crl_sdk.tasks._few_shot import FewShotClassifier

app = typer.Typer(
    help="Learn classes from a few images, and classify others.", no_args_is_help=True
)


@app.command("fit")
def fit(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Directory with one subdirectory of images per class; or use --labels."
        ),
    ],
    out_file: Annotated[
        Path, typer.Option("--out", "-o", help=f"Classifier file to write, {SUFFIX}.")
    ],
    criterion: CriterionOption = "",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with a header and the columns `file`, relative to the directory, "
            "and `label`."
        ),
    ] = None,
    column: Annotated[
        str, typer.Option(help="With --labels: name of the column with the labels.")
    ] = "label",
    standardise: Annotated[
        bool, typer.Option(help="Standardise the rows first, as in the paper.")
    ] = True,
    regularisation: Annotated[
        float,
        typer.Option("-C", help="C of the regression, above 0. Smaller values regularise more."),
    ] = 1.0,
    basis_file: BasisOption = None,
    texts: TextsOption = None,
    prompt: PromptOption = None,
    llm: generation.LlmOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn classes from labelled images by one criterion. Five images per class often suffice.

    Images that cannot be read are listed and left out, and the exit status is then 1.
    """
    require_tasks("crl classify fit")
    if out_file.suffix != SUFFIX:
        raise InvalidInputError(f"--out: expected a {SUFFIX} file, got {str(out_file)!r}")
    require_new(out_file, overwrite=overwrite)
    given = (
        _from_folders(directory) if labels is None else read_label_table(directory, labels, column)
    )
    with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
        basis = model.find_or_make_basis(
            criterion, bases, model.embedder.bundle.fingerprint,
            file=basis_file, texts=texts, prompt=prompt, llm=llm,
        )  # fmt: skip
        images = model.embed_files(list(given))
    require_same_model(images, [basis])
    classifier = FewShotClassifier(basis, standardise=standardise, regularisation=regularisation)
    rows = classifier.project(images.universal)
    assert images.files is not None
    names = [given[file] for file in images.files]
    classifier.fit(rows, names, classes=sorted(set(given.values())))
    accuracy = classifier.cross_validate(rows, names)
    classifier.save(out_file)
    facts: dict[str, Any] = {
        "out": str(out_file),
        "criterion": basis.criterion,
        "classes": classifier.counts,
        "singletons": list(classifier.singletons),
        "cross_validated_accuracy": accuracy,
        "fingerprint": basis.fingerprint,
        "failed": images.failed,
    }
    if as_json:
        print_json(facts)
    else:
        unknown = "not measured: a class has only one image"
        counts = ", ".join(f"{name} {count}" for name, count in classifier.counts.items())
        print_facts(
            str(out_file),
            {"criterion": basis.criterion, "classes": counts,
             "classes with one image": ", ".join(classifier.singletons) or "none",
             "cross-validated accuracy": unknown if accuracy is None else f"{accuracy:.3f}",
             "fingerprint": basis.fingerprint, "failed": len(images.failed)},
        )  # fmt: skip
    if images.failed:
        raise typer.Exit(1)


@app.command("predict")
def predict(
    classifier_file: Annotated[
        Path, typer.Argument(metavar="classifier", help="Classifier file from `crl classify fit`.")
    ],
    images: Annotated[
        list[Path],
        typer.Argument(help="Images and directories of images, or one file of stored embeddings."),
    ],
    table: Annotated[
        Path | None, typer.Option("--csv", help="CSV file to write with all probabilities.")
    ] = None,
    bundle: BundleOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Classify images.

    The probabilities say which class is more likely. They are not calibrated. Images that cannot
    be read are listed and left out, and the exit status is then 1.
    """
    require_new(table, overwrite=overwrite)
    classifier = FewShotClassifier.load(classifier_file)
    if classifier.basis is None:
        raise InvalidInputError(
            f"{classifier_file}: holds no basis and can only classify conditional embeddings: fit "
            "it again with crl classify fit, or use FewShotClassifier.predict"
        )
    with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
        if not all(path.suffix in STORED_SUFFIXES for path in images):
            classifier.require_fingerprint(model.embedder.bundle.fingerprint)
        source = model.read(images)
    require_same_model(source, [classifier.basis])
    probabilities = classifier.predict_proba(classifier.project(source.universal))
    classes = classifier.classes
    best = [classes[i] for i in probabilities.argmax(axis=1)]
    if table is not None:
        data = _csv(source.names, best, classes, probabilities)
        write_atomically(table, data, InvalidInputError)
    if as_json:
        print_json(
            {
                "classifier": str(classifier_file),
                "criterion": classifier.basis.criterion,
                "classes": list(classes),
                "calibrated": False,
                "predictions": [
                    {
                        "file": name,
                        "label": label,
                        "probability": float(row.max()),
                        "probabilities": dict(zip(classes, map(float, row), strict=True)),
                    }
                    for name, label, row in zip(source.names, best, probabilities, strict=True)
                ],
                "failed": source.failed,
            }
        )
    else:
        shown = Table()
        shown.add_column("file", overflow="fold")
        for heading in (classifier.basis.criterion, "probability, not calibrated", "second"):
            shown.add_column(heading)
        for name, label, row in zip(source.names, best, probabilities, strict=True):
            second = row.argsort()[-2]
            runner_up = f"{escape(classes[second])} {row[second]:.3f}"
            shown.add_row(escape(name), escape(label), f"{row.max():.3f}", runner_up)
        out.print(shown)
    if source.failed:
        raise typer.Exit(1)


def _csv(
    names: Sequence[str], best: Sequence[str], classes: Sequence[str], probabilities: NDArray[Any]
) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", "probability", *classes])
    for name, label, row in zip(names, best, probabilities, strict=True):
        writer.writerow([name, label, f"{np.max(row):.6f}", *(f"{p:.6f}" for p in row)])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _from_folders(directory: Path) -> dict[Path, str]:
    """Return the class of each image: the name of the subdirectory that holds it."""
    if not directory.is_dir():
        raise InvalidInputError(
            f"{directory}: expected a directory with one subdirectory of images per class"
        )
    folders = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise InvalidInputError(
            f"{directory}: expected one subdirectory of images for each of two or more classes, "
            f"found {[folder.name for folder in folders]}; or pass --labels FILE"
        )
    given: dict[Path, str] = {}
    for folder in folders:
        try:
            given.update(
                dict.fromkeys(find_image_files([folder], leave_out=leave_out), folder.name)
            )
        except ImageError as error:
            raise InvalidInputError(
                f"class {folder.name!r} has no image: {error}; add one or remove the directory"
            ) from error
    loose = [p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")]
    if loose:
        warn(
            f"{directory}: {len(loose)} files outside the subdirectories are not used, for example "
            f"{loose[0].name}"
        )
    return given
