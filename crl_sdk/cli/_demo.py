"""`crl demo` and `crl demo-data`: pictures regrouped by criteria in words, through the service."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk._embeddings import Embeddings
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, err, note, out, print_json, progress_bar, warn
from crl_sdk.cli._local_server import local_server
from crl_sdk.cli._options import BundleOption, bundle_or_demo
from crl_sdk.cli._report import write_report
from crl_sdk.cli._report_content import (
    ReportSection,
    describe_cluster_count,
    described_groups,
    labelled_groups,
)
from crl_sdk.client._client import Client
from crl_sdk.errors import CrlError, GenerationError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import demo_bundle
from crl_sdk.model._image_files import find_image_files
from crl_sdk.storage._checksummed_safetensors import SUFFIX
from crl_sdk.tasks._clustering import cluster
from crl_sdk.tasks._kmeans import kmeans

_TRUE = "{} true words"


@dataclass(frozen=True, slots=True)
class _Pictures:
    """What is grouped.

    Attributes:
        files: the pictures.
        criteria: by which.
        labels: criterion → each picture's value (n,) int64; empty for the user's own pictures.
        values: criterion → names of the values; likewise.
        words: criterion → the words the pictures were made from; likewise.
        prompt: for all bases.
    """

    files: list[Path]
    criteria: tuple[str, ...]
    labels: dict[str, NDArray[np.int64]]
    values: dict[str, tuple[str, ...]]
    words: dict[str, tuple[str, ...]]
    prompt: str


def demo_data(
    directory: Annotated[Path, typer.Argument(help="Directory to fill; made if missing.")],
    count: Annotated[int, typer.Option("-n", min=1, max=1_000_000, help="Pictures.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal pictures.")] = 0,
) -> None:
    """Render scenes of the demo world as JPEG files, with their factors in labels.csv."""
    note(f"wrote {_render(directory, count, seed)}")


def demo(
    images: Annotated[
        Path | None, typer.Option(help="Directory of your own pictures; else some are rendered.")
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="With --images: what matters about them, separated by commas.")
    ] = "",
    groups: Annotated[
        int, typer.Option(min=0, max=50, help="With --images: how many; 0 lets the pictures tell.")
    ] = 0,
    prompt: Annotated[
        str, typer.Option(help="With --images: template for the texts, with one {}.")
    ] = DEFAULT_PROMPT,
    bundle: BundleOption = None,
    count: Annotated[int, typer.Option("-n", min=100, max=20_000, help="Pictures.")] = 1500,
    directory: Annotated[
        Path, typer.Option("--out", "-o", help="For pictures, bases and the report.")
    ] = Path("demo-output"),
    generate: Annotated[
        bool, typer.Option(help="Let the language model write the texts, beside the true ones.")
    ] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask the language model again, instead of reusing.")
    ] = False,
    llm: generation.LlmOption = None,
    as_json: JsonOption = False,
) -> None:
    """Criteria in words → a language model → bases → `crl serve` → pictures, grouped by each.

    Without --images, on rendered scenes with known answers: the accuracy of k-means with the true
    number of clusters, under the best assignment of clusters to labels, seeds 0-4. They are held
    out of the demo model's training. The report shows what is grouped, beside the universal
    embedding's groups.
    """
    started = time.perf_counter()
    if (images is None) != (not criteria):
        raise InvalidInputError("expected --images and --criteria together, or neither")
    with _needs_tasks():
        given = _scenes(directory, count) if images is None else _own(images, criteria, prompt)
        path = demo_bundle() if images is None else bundle_or_demo(bundle)
        step = _steps()
        bases = _bases(step, path, given, llm, directory, generate, fresh)
        step(f"embedding {len(given.files)} pictures over gRPC")
        seconds, result = _embed(path, directory, given.files, bases)
        step("grouping")
        sections, rows = _group(given, bases, result, groups)
        shown = [file for i, file in enumerate(given.files) if i not in result.errors]
        page = directory / "report.html"
        step("writing the report")
        write_report(page, f"{len(shown)} images, grouped by what matters", sections, shown)
    summary = {
        "images": len(shown),
        "images_per_second": round(len(shown) / seconds, 1),
        "pictures": str(given.files[0].parent),
        "prompt": given.prompt,
        "criteria": rows,
        "report": str(page),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if as_json:
        print_json(summary)
    else:
        _print_table(summary)


def _steps() -> Any:
    """Give what tells the user on stderr, step by step, what is being done."""
    number = 0

    def step(what: str) -> None:
        nonlocal number
        number += 1
        err.print(f"[bold]{number}[/] {what} …", highlight=False)

    return step


def _scenes(directory: Path, count: int) -> _Pictures:
    from crl_export.demo.captions import NEUTRAL_PROMPT
    from crl_export.demo.dataset import TEST_SEED, labels_of, read_labels
    from crl_export.demo.evaluate import own_words
    from crl_export.demo.world import CRITERIA, FACTORS

    folder = directory / f"scenes-{count}"
    if not (folder / "labels.csv").exists():
        _render(folder, count, TEST_SEED)
    files, codes = read_labels(folder / "labels.csv")
    return _Pictures(
        files, CRITERIA, labels_of(codes), {name: FACTORS[name] for name in CRITERIA},
        {name: own_words(name) for name in CRITERIA}, NEUTRAL_PROMPT,
    )  # fmt: skip


def _own(folder: Path, criteria: str, prompt: str) -> _Pictures:
    names = tuple(normalise_criterion(name) for name in criteria.split(",") if name.strip())
    if not folder.is_dir():
        raise InvalidInputError(f"{folder}: expected a directory of images")
    if not names:
        raise InvalidInputError("--criteria: expected one criterion or more, got none")
    files = find_image_files([folder])
    if len(files) < 2:
        raise InvalidInputError(f"{folder}: expected two images or more, found one")
    return _Pictures(files, names, {}, {}, {}, prompt)


def _bases(
    step: Any, path: Path, given: _Pictures, llm: str | None, directory: Path,
    generate: bool, fresh: bool,
) -> dict[str, Basis]:  # fmt: skip
    """Make the bases: the language model's by their criteria, and those of the true words."""
    bases: dict[str, Basis] = {}
    with Embedder.open(path) as embedder:
        if generate:
            step("asking the language model what matters")
            for name in given.criteria:
                basis = _written(name, llm, embedder, given.prompt, directory / "bases", fresh)
                if basis is not None:
                    bases[name] = basis
        for name, words in given.words.items():
            true = _TRUE.format(name)
            bases[true] = embedder.create_basis(true, list(words), prompts=[given.prompt])
    if not bases:
        raise GenerationError("there is no basis to group by: the language model knew no criterion")
    return bases


def _written(
    name: str, llm: str | None, embedder: Embedder, prompt: str, kept: Path, fresh: bool
) -> Basis | None:
    """Give the basis the language model writes, or wrote before; None if it cannot."""
    key = hashlib.sha256(f"{embedder.bundle.fingerprint} {llm} {prompt}".encode()).hexdigest()
    file = kept / f"{name}.{key[:12]}{SUFFIX}"
    if file.exists() and not fresh:
        try:
            basis = Basis.load(file)
            note(f"{name}: texts of an earlier run ({file}); --fresh asks again")
        except CrlError:
            return _written(name, llm, embedder, prompt, kept, fresh=True)
    else:
        try:
            basis = generation.generate_basis(embedder, name, llm, prompts=[prompt])
        except GenerationError as error:
            warn(str(error))
            return None
        kept.mkdir(parents=True, exist_ok=True)
        basis.save(file)
    note(f"  {name}: {', '.join(basis.texts)}")
    return basis


def _embed(
    path: Path, directory: Path, files: Sequence[Path], bases: dict[str, Basis]
) -> tuple[float, Embeddings]:
    """Serve the model in a process of its own, send bases and pictures; give seconds and rows."""
    directory.mkdir(parents=True, exist_ok=True)
    with local_server(path, directory / "serve.log") as server, Client(server.address) as client:
        for basis in bases.values():
            client.put_basis(basis.to_bytes())
        note(f"  crl serve: {server.model} ({server.engine}) on {server.address}")
        started = time.perf_counter()
        result = client.embed(files, list(bases), on_error="collect")
        seconds = time.perf_counter() - started
    for position, error in result.errors.items():
        warn(f"{files[position]}: left out: {error.reason}")
    if len(result.errors) > len(files) - 2:
        raise InvalidInputError("expected two pictures or more that can be read")
    return seconds, result


def _group(
    given: _Pictures, bases: dict[str, Basis], result: Embeddings, count: int
) -> tuple[list[ReportSection], list[dict[str, Any]]]:
    """Cluster by every criterion: what the report shows, and the rows of the table."""
    sections, rows = [], []
    good = [i for i in range(len(given.files)) if i not in result.errors]
    universal = result.universal[good]
    for name in given.criteria:
        own = _TRUE.format(name)
        used = name if name in bases else own
        if used not in bases:
            continue
        conditional, texts = result[used][good], bases[used].texts
        if given.labels:
            from crl_export.demo.evaluate import kmeans_accuracy

            labels, values = given.labels[name][good], given.values[name]
            left, right = (
                labelled_groups(kmeans(each, len(values))[0], labels, values)
                for each in (universal, conditional)
            )
            row: dict[str, Any] = {
                "criterion": name,
                "universal": kmeans_accuracy(universal, labels),
                "true_words": kmeans_accuracy(result[own][good], labels),
            }
            if name in bases:
                row |= {"generated": kmeans_accuracy(conditional, labels), "texts": list(texts)}
            accuracies, remark = (row["universal"], row.get("generated", row["true_words"])), ""
        else:
            split = cluster(conditional, count or None, universal=universal, basis=bases[used])
            plain = cluster(universal, split.k, universal=universal, basis=bases[used])
            left, right = described_groups(plain), described_groups(split)
            remark = describe_cluster_count(split.choice, split.stability)
            row = {
                "criterion": name,
                "groups": {group.name: group.size for group in right},
                "texts": list(texts),
            }
            accuracies = None
        rows.append(row)
        sections.append(
            ReportSection(name, tuple(texts), name in bases, left, right, accuracies, remark)
        )
    return sections, rows


def _render(directory: Path, count: int, seed: int) -> Path:
    from crl_export.demo.dataset import write_dataset

    with progress_bar() as progress:
        task = progress.add_task("rendering", total=count)
        try:
            table: Path = write_dataset(
                directory,
                count,
                seed,
                on_progress=lambda done: progress.update(task, completed=done),
            )
        except OSError as error:
            raise InvalidInputError(f"{directory}: {error}; choose an empty directory") from error
    return table


@contextmanager
def _needs_tasks() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "scikit-learn", "tasks", "crl demo") from error


def _print_table(summary: dict[str, Any]) -> None:
    rows = summary["criteria"]
    table = Table("criterion", title_justify="left")
    if "groups" in rows[0]:
        table.add_column("groups by it, with their pictures")
        for row in rows:
            told = ", ".join(f"{name} {size}" for name, size in row["groups"].items())
            table.add_row(row["criterion"], told)
    else:
        table.title = f"Clustering accuracy on {summary['images']} pictures"
        table.add_column("universal", justify="right")
        table.add_column(
            "conditional, texts from the language model", justify="right", style="bold"
        )
        table.add_column("conditional, true words", justify="right")
        for row in rows:
            generated = f"{row['generated']:.3f}" if "generated" in row else "none"
            table.add_row(
                row["criterion"], f"{row['universal']:.3f}", generated, f"{row['true_words']:.3f}"
            )
    out.print(table)
    out.print(f"report: {summary['report']}", highlight=False)
    note(
        f"{summary['images_per_second']} pictures a second over gRPC, decoding included; "
        f"{summary['seconds']} s in all"
    )
