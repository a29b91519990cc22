"""`crl classify`: learn classes from a handful of labelled pictures, and name others by them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, out, print_facts, print_json, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    ThreadsOption,
)
from crl_sdk.cli._sources import (
    BasisOption,
    CriterionOption,
    PromptOption,
    TextsOption,
    require_same_model,
    require_tasks,
    workbench,
)
from crl_sdk.errors import ImageError, InvalidInputError
from crl_sdk.model._image_files import find_image_files
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.storage._checksummed_safetensors import SUFFIX
from crl_sdk.stored._reader import SUFFIXES as STORED
from crl_sdk.tasks._few_shot import FewShotClassifier

app = typer.Typer(help="Learn classes from a few pictures; classify others.", no_args_is_help=True)


@app.command("fit")
def fit(
    directory: Annotated[
        Path, typer.Argument(help="One sub-folder of pictures for each class; or see --labels.")
    ],
    out_file: Annotated[Path, typer.Option("--out", "-o", help=f"The {SUFFIX} file to write.")],
    criterion: CriterionOption = "",
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV file with a header: `file`, relative to DIR, and `label`."),
    ] = None,
    column: Annotated[str, typer.Option(help="With --labels: the column of the label.")] = "label",
    standardise: Annotated[
        bool, typer.Option(help="Bring rows to the paper's form before learning.")
    ] = True,
    regularisation: Annotated[
        float, typer.Option("-C", help="Of the regression, above 0; less regularises more.")
    ] = 1.0,
    basis_file: BasisOption = None,
    texts: TextsOption = None,
    prompt: PromptOption = DEFAULT_PROMPT,
    llm: generation.LlmOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    as_json: JsonOption = False,
) -> None:
    """Learn classes from labelled pictures, by one criterion; five of each are often enough.

    Unreadable pictures are named and left out, and the exit status is then 1.
    """
    require_tasks("crl classify fit")
    if out_file.suffix != SUFFIX:
        raise InvalidInputError(f"--out: expected a {SUFFIX} file, got {str(out_file)!r}")
    given = _from_folders(directory) if labels is None else _from_table(directory, labels, column)
    with workbench(bundle, engine, threads, decode) as bench:
        basis = bench.basis(criterion, bases, file=basis_file, texts=texts, prompt=prompt, llm=llm)
        material = bench.pictures(list(given))
    require_same_model(material, [basis])
    classifier = FewShotClassifier(basis, standardise=standardise, regularisation=regularisation)
    rows = classifier.project(material.universal)
    assert material.files is not None
    names = [given[file] for file in material.files]
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
        "failed": material.failed,
    }
    if as_json:
        print_json(facts)
    else:
        told = "none: a class has one picture only" if accuracy is None else f"{accuracy:.3f}"
        counts = ", ".join(f"{name} {count}" for name, count in classifier.counts.items())
        print_facts(
            str(out_file),
            {**facts, "classes": counts, "cross_validated_accuracy": told,
             "singletons": ", ".join(classifier.singletons) or "none",
             "failed": len(material.failed)},
        )  # fmt: skip
    if material.failed:
        raise typer.Exit(1)


@app.command("predict")
def predict(
    model: Annotated[Path, typer.Argument(help="A file of `crl classify fit`.")],
    images: Annotated[
        list[Path],
        typer.Argument(help="Pictures, directories of them, or one file of stored embeddings."),
    ],
    table: Annotated[
        Path | None, typer.Option("--csv", help="Write all probabilities to this CSV file.")
    ] = None,
    bundle: BundleOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    as_json: JsonOption = False,
) -> None:
    """Classify pictures. Probabilities say which class is likelier; they are not calibrated.

    Unreadable pictures are named and left out, and the exit status is then 1.
    """
    classifier = FewShotClassifier.load(model)
    if classifier.basis is None:
        raise InvalidInputError(
            f"{model}: holds no basis, so that it takes conditional rows alone; fit it with "
            "crl classify fit, or use FewShotClassifier.predict"
        )
    with workbench(bundle, engine, threads, decode) as bench:
        if not all(path.suffix in STORED for path in images):
            classifier.require_fingerprint(bench.embedder.bundle.fingerprint)
        material = bench.material(images)
    require_same_model(material, [classifier.basis])
    chances = classifier.predict_proba(classifier.project(material.universal))
    classes = classifier.classes
    best = [classes[i] for i in chances.argmax(axis=1)]
    if table is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "label", "probability", *classes])
        for name, label, row in zip(material.names, best, chances, strict=True):
            writer.writerow([name, label, f"{row.max():.6f}", *(f"{p:.6f}" for p in row)])
        data = text.getvalue().encode("utf-8", "surrogateescape")
        write_atomically(table, data, InvalidInputError)
    if as_json:
        print_json(
            {
                "model": str(model),
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
                    for name, label, row in zip(material.names, best, chances, strict=True)
                ],
                "failed": material.failed,
            }
        )
    else:
        shown = Table()
        shown.add_column("file", overflow="fold")
        for heading in (classifier.basis.criterion, "probability, not calibrated", "next"):
            shown.add_column(heading)
        for name, label, row in zip(material.names, best, chances, strict=True):
            second = row.argsort()[-2]
            runner_up = f"{escape(classes[second])} {row[second]:.3f}"
            shown.add_row(escape(name), escape(label), f"{row.max():.3f}", runner_up)
        out.print(shown)
    if material.failed:
        raise typer.Exit(1)


def _from_folders(directory: Path) -> dict[Path, str]:
    """Give each picture's class: the sub-folder that it is in."""
    if not directory.is_dir():
        raise InvalidInputError(
            f"{directory}: expected a directory with one sub-folder of pictures for each class"
        )
    folders = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise InvalidInputError(
            f"{directory}: expected one sub-folder of pictures for each of two classes or more, "
            f"found {[folder.name for folder in folders]}; or pass --labels FILE"
        )
    given: dict[Path, str] = {}
    for folder in folders:
        try:
            given.update(dict.fromkeys(find_image_files([folder]), folder.name))
        except ImageError as error:
            raise InvalidInputError(
                f"class {folder.name!r} has no picture: {error}; add one or remove the folder"
            ) from error
    loose = [p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")]
    if loose:
        warn(f"{directory}: {len(loose)} files in no sub-folder are not used, as {loose[0].name}")
    return given


def _from_table(directory: Path, path: Path, column: str) -> dict[Path, str]:
    """Give each picture's class out of a CSV file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            if "file" not in header or column not in header:
                raise InvalidInputError(
                    f"{path}: expected a first line that names the columns 'file' and {column!r}, "
                    f"separated by commas, found {header}; --column names another one"
                )
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path}: expected CSV in UTF-8 ({error})") from error
    given: dict[Path, str] = {}
    for number, line in lines:
        name, label = (line["file"] or "").strip(), (line[column] or "").strip()
        if not name or not label or None in line:
            raise InvalidInputError(
                f"{path}, line {number}: expected a file and a label and {len(header)} columns, "
                f"found {[value for value in line.values() if value is not None]}"
            )
        if given.setdefault(directory / name, label) != label:
            raise InvalidInputError(
                f"{path}, line {number}: {name!r} is {label!r} here and "
                f"{given[directory / name]!r} before: keep one"
            )
    if not given:
        raise InvalidInputError(f"{path}: expected a line for each labelled picture, found none")
    return given
