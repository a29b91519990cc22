"""`crl eval vectors`: compare the projection methods on stored vectors, without a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._methods import METHODS
from crl_sdk.cli._basis import read_texts
from crl_sdk.cli._console import JsonOption, note, out, print_json, spinner
from crl_sdk.cli._evaluate import parse_names, parse_shots
from crl_sdk.cli._options import OverwriteOption, parse_criteria, require_new
from crl_sdk.cli._sources import require_tasks
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation import _results as report
from crl_sdk.evaluation import _vector_results as results
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._vector_noise import CLEAN, NOISES
from crl_sdk.evaluation._vector_protocols import (
    DESCRIBING,
    VECTOR_PROTOCOLS,
    VectorOptions,
    run_vectors,
)
from crl_sdk.evaluation._vectors import (
    TEXT,
    WORDS,
    VectorFile,
    read_background,
    read_images,
    read_labels,
    read_text_vectors,
    require_one_space,
)

_ARRAYS = ("image", "text", "word", "kind")


def evaluate_vectors(
    data: Annotated[Path, typer.Option(help="Image vectors and labels: a .npz or .parquet file.")],
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN, or COLUMN=CRITERION if the criterion has another name. Repeat for more. "
            "Default: the columns with the name of a criterion."
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="File of text vectors, if --data does not hold them. Repeat for more."),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(
            help="CRITERION=FILE with its words, one a line. Their vectors are taken from the "
            "bank of words in --texts. Repeat for more."
        ),
    ] = None,
    criteria: Annotated[
        str,
        typer.Option(
            help="Criteria to use, separated by commas: those that are evaluated, and the other "
            "criteria of the methods that need some. Default: all in the files."
        ),
    ] = "",
    background: Annotated[
        str | None,
        typer.Option(
            help="Generic texts for the method contrastive: the name of an array (n, d), or a kind "
            "of the bank of words, which is then no criterion. Default: the array background, if "
            "a file has it."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Column of groups, such as near-duplicates, that must not be compared with each "
            "other. Default: group, if --data has it."
        ),
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=STORED if an array has another name in your files: image, text, word, "
            "kind, text:CRITERION or words:CRITERION. Repeat for more."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Projection methods, separated by commas.")
    ] = ",".join(DESCRIBING),
    protocol: Annotated[
        str, typer.Option(help="Protocols to run, separated by commas.")
    ] = ",".join(VECTOR_PROTOCOLS),
    noise: Annotated[
        str,
        typer.Option(
            help="What to mix into the texts, separated by commas: clean (nothing), off-topic "
            "(half as many generic texts), other-criteria (half as many texts of those). The "
            "methods are evaluated with each."
        ),
    ] = CLEAN,
    seeds: Annotated[int, typer.Option(min=1, help="Number of k-means seeds.")] = 20,
    shots: Annotated[str, typer.Option(help="Numbers of training images per class.")] = "1,5,10",
    splits: Annotated[
        int, typer.Option(min=1, help="Number of random choices of the training images.")
    ] = 20,
    min_class_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Leave out classes with fewer images (with groups: fewer groups). Default: one "
            "more than the largest number of shots; 2 without few-shot.",
        ),
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write the results to: .md or .json.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all projection methods on stored vectors.

    Needs neither images nor a model. The universal embedding, two controls and every method are
    evaluated with the paper's protocols, and compared with the paper's method, cosine. docs/EVAL.md
    describes the layout of the files.
    """
    started = time.perf_counter()
    if out_file is not None:
        report.check_path(out_file)
        require_new(out_file, overwrite=overwrite)
    protocols = parse_names("--protocol", protocol, VECTOR_PROTOCOLS)
    methods = tuple(m for m in METHODS if m in parse_names("--method", method, METHODS))
    noises = parse_names("--noise", noise, NOISES)
    options = VectorOptions(methods, protocols, seeds, parse_shots(shots), splits, noises)
    smallest = _smallest_class(min_class_size, options)
    require_tasks("crl eval")
    renamed = _renamed(array)
    lists = {
        normalise_criterion(c): read_texts(Path(path))
        for c, path in _pairs("--words", words, "CRITERION=FILE").items()
    }
    file = VectorFile(data, renamed)
    files = [file, *(VectorFile(path, renamed) for path in texts or ())]
    require_one_space(files)
    images, scaled = read_images(file)
    known, notes = read_text_vectors(files, lists, images.shape[1])
    generic = read_background(files, background, known, images.shape[1])
    known = _select(criteria, known)
    columns = _columns(labels, file, known)
    vectors = read_labels(file, images, list(columns), group, smallest)
    notes = [*scaled, *notes, *vectors.notes]
    for each in notes:
        note(each)
    with spinner("measuring") as status:
        rows, remarks = run_vectors(
            vectors, columns, known, options, status.update, background=generic
        )
    for each in remarks:
        note(each)
    settings: dict[str, Any] = {"protocols": list(protocols), "methods": list(methods)}
    if "clustering" in protocols:
        settings |= {"seeds": seeds}
    if "few-shot" in protocols:
        settings |= {"shots": list(options.shots), "splits": splits}
    settings |= {"texts": list(noises)}
    settings |= {"generic texts": 0 if generic is None else len(generic)}
    settings |= {"smallest class": smallest, "grouped": "yes" if vectors.grouped else "no"}
    found = results.make_document(
        data.name, vectors, criteria=columns, rows=rows, texts=known, settings=settings,
        notes=[*notes, *remarks],
    )  # fmt: skip
    found["seconds"] = round(time.perf_counter() - started, 1)
    if out_file is not None:
        results.write_document(out_file, found)
        note(f"wrote {out_file}")
    if as_json:
        print_json(found)
    else:
        _print(found)


def _smallest_class(given: int | None, options: VectorOptions) -> int:
    needed = max(options.shots) + 1 if "few-shot" in options.protocols else 2
    if given is not None and given < needed:
        raise InvalidInputError(
            f"--min-class-size: {max(options.shots)} shots need classes of at least {needed}, got "
            f"{given}: pass fewer --shots, or --protocol clustering,retrieval"
        )
    return given or needed


def _pairs(option: str, given: Sequence[str] | None, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given or ():
        name, _, value = (part.strip() for part in each.partition("="))
        if not name or not value:
            raise InvalidInputError(f"{option}: expected {form}, got {each!r}")
        if name in found:
            raise InvalidInputError(f"{option}: {name} is given twice; leave one out")
        found[name] = value
    return found


def _renamed(given: Sequence[str] | None) -> dict[str, str]:
    found = _pairs("--array", given, "NAME=STORED, such as image=clip_vectors")
    for name in found:
        if name not in _ARRAYS and not name.startswith((TEXT, WORDS)):
            raise InvalidInputError(
                f"--array: expected one of {', '.join(_ARRAYS)}, {TEXT}CRITERION and "
                f"{WORDS}CRITERION before the '=', got {name!r}"
            )
    return found


def _select(given: str, known: Mapping[str, CriterionTexts]) -> dict[str, CriterionTexts]:
    """Keep the criteria that the user named."""
    if not known:
        raise InvalidInputError(
            "no text vectors: expected arrays text:CRITERION (k, d) in --data or in --texts FILE, "
            "or a bank of words in --texts FILE: text (k, d), word (k,) and kind (k,)"
        )
    names = parse_criteria(given)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInputError(
            f"--criteria: expected some of {', '.join(known)}, got {', '.join(unknown)}"
        )
    return {name: known[name] for name in names or known}


def _columns(
    given: Sequence[str] | None, file: VectorFile, known: Mapping[str, CriterionTexts]
) -> dict[str, str]:
    """Return the criterion of each label column."""
    if not given:
        found = {name: name for name in known if name in file}
        if not found:
            raise InvalidInputError(
                f"{file.path}: no column has the name of a criterion ({', '.join(known)}): pass "
                f"--labels COLUMN=CRITERION; the file has {', '.join(file.names)}"
            )
        return found
    found = {}
    for each in given:
        column, equals, criterion = (part.strip() for part in each.partition("="))
        name = normalise_criterion(criterion if equals else column)
        if name not in known:
            raise InvalidInputError(
                f"--labels: {each!r}: there are no texts of {name}; expected COLUMN=CRITERION with "
                f"a criterion of {', '.join(known)}"
            )
        if column in found:
            raise InvalidInputError(f"--labels: {column} is given twice; leave one out")
        found[column] = name
    return found


def _print(found: Mapping[str, Any]) -> None:
    title = f"{found['data']}: {found['images']} image vectors"
    for header, cells in results.tables(found["rows"]):
        table = Table(*map(escape, header), title=escape(title), title_justify="left")
        before = None
        for scores, apart in cells:
            first = scores[0] != before
            if first and before is not None:
                table.add_section()
            before = scores[0]
            shown = [before if first else "", *scores[1:]]
            table.add_row(
                *(escape(f"{a}\n{b}" if b else a) for a, b in zip(shown, apart, strict=True))
            )
        out.print(table)
        title = ""
    note(f"{report.format_settings(found)}. {results.EXPLANATION}")
