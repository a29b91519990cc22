"""`crl eval`: run the paper's benchmarks with your model and your bases."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk.basis._methods import PAPER_METHOD, Method
from crl_sdk.cli._console import JsonOption, note, out, print_json, progress_bar, spinner, warn
from crl_sdk.cli._evaluation_texts import (
    TextSources,
    check_prompts,
    find_texts,
    parse_basis_files,
    parse_pairs,
    require_texts,
)
from crl_sdk.cli._generation import LlmOption
from crl_sdk.cli._options import (
    BundleOption,
    EngineOption,
    OverwriteOption,
    ThreadsOption,
    open_bundle,
    open_embedder,
    require_new,
)
from crl_sdk.cli._sources import require_tasks
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation import _protocols as run
from crl_sdk.evaluation import _results as report
from crl_sdk.evaluation._benchmarks import BENCHMARKS, Benchmark, BenchmarkName
from crl_sdk.evaluation._cards import read_cards
from crl_sdk.evaluation._clevr4 import read_clevr4
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._dataset import DataSetError, LabelledImages
from crl_sdk.evaluation._deepfashion import DeepFashion, read_deepfashion
from crl_sdk.evaluation._genecis import GeneCis, read_genecis
from crl_sdk.evaluation._labels_csv import read_table
from crl_sdk.evaluation._published_scores import read_paper_rows, read_published
from crl_sdk.model._bundle import ModelBundle, demo_bundle

_RENDERED = 1000
"""Default number of scenes of the demo world."""


@dataclass(frozen=True, slots=True)
class _Options:
    """Options of the protocols."""

    method: Method
    protocols: tuple[str, ...]
    seeds: int
    shots: tuple[int, ...]
    splits: int
    components: int | None


def evaluate(
    name: BenchmarkName,
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of the data set. Default for demo: scenes are rendered."),
    ] = None,
    bundle: BundleOption = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(help="CRITERION=FILE with its texts, one a line. Repeat for more criteria."),
    ] = None,
    basis: Annotated[list[str] | None, typer.Option(help="Basis file. Repeat for more.")] = None,
    bases: Annotated[Path | None, typer.Option(help="Directory of basis files.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the local language model write the texts.")
    ] = False,
    llm: LlmOption = None,
    own_words: Annotated[
        bool,
        typer.Option("--own-words", help="demo only: use the words that the scenes are made from."),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="CRITERION=PROMPT instead of the paper's prompt, with one {} for the text."
        ),
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="Criteria to run, separated by commas. Default: all.")
    ] = "",
    method: Annotated[
        Method, typer.Option(help="Projection method. The paper uses cosine.")
    ] = PAPER_METHOD,
    protocol: Annotated[
        str, typer.Option(help="clustering, few-shot or both, separated by commas.")
    ] = ",".join(run.PROTOCOLS),
    seeds: Annotated[int, typer.Option(min=1, help="Number of k-means seeds.")] = 20,
    shots: Annotated[str, typer.Option(help="Numbers of training images per class.")] = "1,5,10",
    splits: Annotated[
        int, typer.Option(min=1, help="Number of random choices of the training images.")
    ] = 20,
    split: Annotated[str, typer.Option(help="deepfashion only: test or valid.")] = "test",
    components: Annotated[
        int | None,
        typer.Option(
            min=1, help="deepfashion only: size of reduced bases. Default: that of the smallest."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use a random sample of so many images (GeneCIS: queries), for trying."
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(help="CSV file of more published scores to print, see docs/EVAL.md."),
    ] = None,
    no_published: Annotated[
        bool, typer.Option("--no-published", help="Leave out the paper's own scores.")
    ] = False,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per engine run.")] = 32,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write the results to: .md or .json.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a benchmark of the paper.

    Universal and conditional embeddings are compared, and the paper's scores are shown with them.
    Data sets are read in their official layouts and never downloaded. docs/EVAL.md says where to
    get them, which choices are the authors', and which tables have not been run here.
    """
    started = time.perf_counter()
    benchmark = BENCHMARKS[name]
    if out_file is not None:
        report.check_path(out_file)
        require_new(out_file, overwrite=overwrite)
    paper = () if no_published or split != "test" else read_paper_rows(name)
    others = None if published is None else read_published(published)
    known = tuple(benchmark.prompts)
    wanted = _criteria(criteria, known)
    protocols = (
        parse_names("--protocol", protocol, run.PROTOCOLS) if benchmark.task == "labels" else ()
    )
    numbers = parse_shots(shots)
    if split not in ("test", "valid"):
        raise InvalidInputError(f"--split: expected test or valid, got {split!r}")
    if benchmark.task == "deepfashion" and (method != PAPER_METHOD or len(wanted) < len(known)):
        raise InvalidInputError(
            "deepfashion runs only with --method cosine and all criteria: leave both options out"
        )
    if own_words and name != "demo":
        raise InvalidInputError(f"--own-words: only the benchmark demo has such words, not {name}")
    own_prompts = parse_pairs("--prompt", prompt, known)
    prompts = {**benchmark.prompts, **own_prompts}
    lists = {c: Path(path) for c, path in parse_pairs("--texts", texts, known).items()}
    opened = open_bundle(bundle)
    sources = TextSources(
        lists, parse_basis_files(basis, known), bases, opened.fingerprint, generate, llm, own_words
    )
    check_prompts(own_prompts, sources)
    _require_data(name, benchmark, data)
    require_texts(wanted, sources, prompts, bundle, name)
    if benchmark.task == "labels":
        require_tasks("crl eval")
    with _data(name, wanted, data, split, limit) as read:
        if isinstance(read, LabelledImages):
            _require_shots(read, wanted, numbers if "few-shot" in protocols else ())
        with open_embedder(opened, engine, threads) as embedder:
            used = {c: find_texts(c, sources, prompts[c], embedder) for c in wanted}
            run.check_texts(used, method, protocols)
            with progress_bar() as bar:
                task = bar.add_task("embedding", total=len(read.files))
                universal = run.embed_files(
                    embedder, read.files, batch_size=batch_size,
                    progress=lambda done: bar.update(task, completed=done),
                )  # fmt: skip
            options = _Options(method, protocols, seeds, numbers, splits, components)
            with spinner("measuring") as status:
                rows, settings = _measure(read, universal, used, embedder, options, status.update)
            found = report.make_document(
                name, benchmark, rows=rows, texts=used, bundle=embedder.bundle,
                engine=embedder.engine, images=len(read.files), settings=settings,
                notes=read.notes,
                remarks=_remarks(name, benchmark, embedder.bundle),
                paper=paper, published=others,
            )  # fmt: skip
    found["seconds"] = round(time.perf_counter() - started, 1)
    if out_file is not None:
        report.write_document(out_file, found)
        note(f"wrote {out_file}")
    if as_json:
        print_json(found)
    else:
        _print(found)


def command(name: BenchmarkName) -> Callable[..., None]:
    """Return `evaluate` with the name of a benchmark filled in, for the command line."""
    signature = inspect.signature(evaluate, eval_str=True)

    @wraps(evaluate)
    def run_benchmark(**options: Any) -> None:
        evaluate(name, **options)

    options = [each for each in signature.parameters.values() if each.name != "name"]
    run_benchmark.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return run_benchmark


def _measure(
    read: LabelledImages | GeneCis | DeepFashion,
    universal: NDArray[np.float32],
    texts: Mapping[str, CriterionTexts],
    embedder: Embedder,
    options: _Options,
    step: run.Step,
) -> tuple[list[run.ResultRow], dict[str, Any]]:
    """Run the protocols of a data set. Return the rows and the settings that matter."""
    settings: dict[str, Any] = {"method": options.method}
    if isinstance(read, LabelledImages):
        settings |= {"protocols": list(options.protocols)}
        if "clustering" in options.protocols:
            settings |= {"seeds": options.seeds}
        if "few-shot" in options.protocols:
            settings |= {"shots": list(options.shots), "splits": options.splits}
        rows = run.run_labelled(
            read, universal, texts, method=options.method,
            background=embedder.bundle.background, protocols=options.protocols,
            seeds=options.seeds, shots=options.shots, splits=options.splits, step=step,
        )  # fmt: skip
    elif isinstance(read, GeneCis):
        rows = run.run_genecis(
            read, universal, texts["scene"], partial(embedder.embed_text, truncate=True),
            method=options.method, background=embedder.bundle.background, step=step,
        )  # fmt: skip
    else:
        settings |= {"components": run.reduced_size(texts, options.components)}
        rows = run.run_deepfashion(read, universal, texts, components=options.components, step=step)
    return rows, settings


def _require_data(name: BenchmarkName, benchmark: Benchmark, data: Path | None) -> None:
    if data is None and name != "demo":
        raise InvalidInputError(
            f"--data: expected a directory with {benchmark.layout}; get {name} from "
            f"{benchmark.source}, see docs/EVAL.md"
        )


@contextmanager
def _data(
    name: BenchmarkName, wanted: Sequence[str], data: Path | None, split: str, limit: int | None
) -> Iterator[LabelledImages | GeneCis | DeepFashion]:
    """Yield the data set. Without a directory, render scenes in a temporary one."""
    if data is not None:
        read = _read(name, wanted, data, split)
        yield read if limit is None else read.sample(limit)
        return
    with tempfile.TemporaryDirectory(prefix="crl-eval-") as scratch:
        from crl_export.demo.dataset import TEST_SEED, write_dataset

        count = limit or _RENDERED
        note(f"rendering {count} scenes that the demo model was not trained on")
        write_dataset(Path(scratch), count, TEST_SEED)
        yield _read(name, wanted, Path(scratch), split)


def _read(
    name: BenchmarkName, wanted: Sequence[str], data: Path, split: str
) -> LabelledImages | GeneCis | DeepFashion:
    """Read a data set. Of labelled images, keep the wanted criteria."""
    benchmark = BENCHMARKS[name]
    try:
        if benchmark.task == "genecis":
            return read_genecis(data, name.removeprefix("genecis-"))
        if benchmark.task == "deepfashion":
            return read_deepfashion(data, split)
        if benchmark.columns is not None:
            return read_table(data, benchmark.columns).select(wanted)
        return (read_clevr4(data) if name == "clevr4" else read_cards(data)).select(wanted)
    except OSError as error:
        raise DataSetError(f"{data}: {error.filename} cannot be read ({error.strerror})") from error


def _require_shots(data: LabelledImages, wanted: Sequence[str], shots: Sequence[int]) -> None:
    """Check, before images are embedded, that each class has enough images for the shots."""
    for criterion in wanted:
        labels = data.labels[criterion]
        classes, sizes = np.unique(labels.codes, return_counts=True)
        if len(classes) < 2:
            raise InvalidInputError(
                f"{criterion}: expected images of two classes or more, found {len(classes)}"
            )
        if shots and sizes.min() <= max(shots):
            smallest = labels.values[int(classes[sizes.argmin()])]
            raise InvalidInputError(
                f"{criterion}: {max(shots)} shots need {max(shots) + 1} images of each class, "
                f"{smallest!r} has {sizes.min()}: pass fewer with --shots, or --protocol clustering"
            )


def _remarks(name: BenchmarkName, benchmark: Benchmark, bundle: ModelBundle) -> list[str]:
    """Return remarks on the limits of the results."""
    remarks = [benchmark.remark] if benchmark.remark else []
    if name != "demo" and bundle.fingerprint == ModelBundle.open(demo_bundle()).fingerprint:
        remarks.append(
            "the demo model has never seen such images: the results only show that the command "
            "runs, and say nothing about the method"
        )
    return remarks


def _criteria(given: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(normalise_criterion(p) for p in given.split(",") if p.strip()))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInputError(f"--criteria: expected some of {', '.join(known)}, got {unknown}")
    return names or tuple(known)


def parse_names(option: str, given: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse names that are separated by commas."""
    parts = tuple(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    if not parts or not set(parts) <= set(known):
        raise InvalidInputError(f"{option}: expected some of {', '.join(known)}, got {given!r}")
    return parts


def parse_shots(given: str) -> tuple[int, ...]:
    """Parse the value of `--shots`."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in given.split(",") if part.strip()))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InvalidInputError(f"--shots: expected whole numbers such as 1,5,10, got {given!r}")
    return numbers


def _print(found: Mapping[str, Any]) -> None:
    model = found["model"]
    title = f"{found['benchmark']}: {model['name']} ({model['engine']}), {found['images']} images"
    labels = {row["label"] for row in found["paper_rows"]}
    for header, cells in report.tables(found):
        table = Table(*map(escape, header), title=escape(title), title_justify="left")
        before = None
        for row in cells:
            if before not in (None, row[0]):
                table.add_section()
            dim = "dim" if row[1] in labels else None
            table.add_row(*map(escape, row), style=dim)
            before = row[0]
        out.print(table)
        title = ""
    if found["paper_encoder"]:
        note(f"the paper uses {found['paper_encoder']} for this benchmark")
    if found["published"]:
        note(f"published scores, in brackets, are from {'; '.join(found['published'])}")
    note(f"model {model['fingerprint'][:12]}…; {report.format_settings(found)}; scores in percent")
    for each in (*report.format_paper_notes(found), *found["notes"]):
        note(each)
    for each in found["remarks"]:
        warn(each)
