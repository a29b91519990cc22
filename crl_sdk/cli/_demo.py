"""`crl demo` and `crl demo-data`: group images by criteria in words, through the service."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk._embeddings import Embeddings
from crl_sdk.basis._basis import Basis
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import (
    JsonOption,
    err,
    leave_out,
    note,
    out,
    print_json,
    progress_bar,
    warn,
)
from crl_sdk.cli._local_server import local_server
from crl_sdk.cli._options import BundleOption, open_bundle
from crl_sdk.cli._report import write_report
from crl_sdk.cli._report_content import (
    ReportSection,
    describe_cluster_count,
    described_groups,
    labelled_groups,
)
from crl_sdk.client._client import Client
from crl_sdk.errors import CrlError, GenerationError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle, demo_bundle
from crl_sdk.model._image_files import find_image_files
from crl_sdk.storage._checksummed_safetensors import SUFFIX
from crl_sdk.tasks._clustering import cluster
from crl_sdk.tasks._kmeans import kmeans

_TRUE_WORDS = "{} true words"  # name of the basis made from the words of the demo world


@dataclass(frozen=True, slots=True)
class _DemoImages:
    """Images to group.

    Attributes:
        files: The n image files.
        criteria: Criteria to group them by.
        prompt: Prompt of all bases.
        labels: Label of each image for each criterion, shape (n,), int64. Empty for the user's own
            images, like the next two.
        values: Names of the labels of each criterion.
        words: Words of the demo world that the images of each criterion were made from.
    """

    files: list[Path]
    criteria: tuple[str, ...]
    prompt: str
    labels: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


def demo_data(
    directory: Annotated[Path, typer.Argument(help="Directory to fill. Created if missing.")],
    count: Annotated[
        int, typer.Option("-n", min=1, max=1_000_000, help="Number of images.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal images.")] = 0,
) -> None:
    """Render labelled scenes of the demo world.

    The scenes are JPEG files. Their labels are in labels.csv.
    """
    note(f"wrote {_render(directory, count, seed)}")


def demo(
    images: Annotated[
        Path | None,
        typer.Option(help="Directory of your own images. Default: rendered demo scenes."),
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="With --images: criteria to group by, separated by commas.")
    ] = "",
    groups: Annotated[
        int,
        typer.Option(
            min=0, max=50, help="With --images: number of groups. 0 chooses it by silhouette."
        ),
    ] = 0,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="With --images: prompt for the texts, with one {}. Default: what the bundle "
            "recommends."
        ),
    ] = None,
    bundle: BundleOption = None,
    count: Annotated[
        int, typer.Option("-n", min=100, max=20_000, help="Number of demo scenes.")
    ] = 1500,
    directory: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for scenes, bases and the report.")
    ] = Path("demo-output"),
    generate: Annotated[
        bool,
        typer.Option(help="Let the language model write texts, in addition to the true words."),
    ] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask the language model again. Ignore earlier texts.")
    ] = False,
    llm: generation.LlmOption = None,
    as_json: JsonOption = False,
) -> None:
    """Group images by criteria in words, and write a report.

    The language model writes texts for each criterion, and bases are made from the texts. Then
    `crl serve` embeds the images, and the images are grouped by each criterion. The report shows
    them next to the groups of the universal embedding.

    Without --images, scenes of the demo world are rendered, which the demo model was not trained
    on. Their labels are known, so the accuracy of k-means is measured: with the true number of
    clusters, the best assignment of clusters to labels, and seeds 0 to 4.
    """
    started = time.perf_counter()
    if (images is None) != (not criteria):
        raise InvalidInputError("expected --images and --criteria together, or neither")
    with _needs_tasks():
        if images is None:
            model, given = ModelBundle.open(demo_bundle()), _scenes(directory, count)
        else:
            model = open_bundle(bundle)
            given = _own(images, criteria, prompt or model.prompt)
        path = model.path
        step = _steps()
        bases = _make_bases(step, path, given, llm, directory, generate, fresh)
        step(f"embedding {len(given.files)} images over gRPC")
        seconds, result = _embed(path, directory, given.files, bases)
        warning = _warning(model, result)
        step("grouping")
        sections, rows = _group(given, bases, result, groups)
        shown = [file for i, file in enumerate(given.files) if i not in result.errors]
        page = directory / "report.html"
        step("writing the report")
        title = f"{len(shown)} images, grouped by {', '.join(each.criterion for each in sections)}"
        write_report(page, title, sections, shown, model=model.manifest.name, warning=warning)
    summary = {
        "model": model.manifest.name,
        "warning": warning,
        "images": len(shown),
        "images_per_second": round(len(shown) / seconds, 1),
        "directory": str(given.files[0].parent),
        "prompt": given.prompt,
        "criteria": rows,
        "report": str(page),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if as_json:
        print_json(summary)
    else:
        _print_table(summary)


def _warning(model: ModelBundle, result: Embeddings) -> str | None:
    """Print and return a warning if the model has never seen such images."""
    if model.familiar_images is None:
        return None
    distances = model.familiar_images.distances(result.universal[result.ok])
    warning = model.familiar_images.warning(distances, model.manifest.name)
    if warning is not None:
        warn(warning)
    return warning


def _steps() -> Callable[[str], None]:
    """Return a function that prints numbered steps on stderr."""
    number = 0

    def step(what: str) -> None:
        nonlocal number
        number += 1
        err.print(f"[bold]{number}[/] {what} …", highlight=False)

    return step


def _scenes(directory: Path, count: int) -> _DemoImages:
    from crl_export.demo.captions import NEUTRAL_PROMPT
    from crl_export.demo.dataset import TEST_SEED, labels_of, read_labels
    from crl_export.demo.evaluate import own_words
    from crl_export.demo.world import CRITERIA, FACTORS

    folder = directory / f"scenes-{count}"
    if not (folder / "labels.csv").exists():
        _render(folder, count, TEST_SEED)
    files, codes = read_labels(folder / "labels.csv")
    return _DemoImages(
        files,
        CRITERIA,
        NEUTRAL_PROMPT,
        labels=labels_of(codes),
        values={name: FACTORS[name] for name in CRITERIA},
        words={name: own_words(name) for name in CRITERIA},
    )


def _own(folder: Path, criteria: str, prompt: str) -> _DemoImages:
    names = tuple(normalise_criterion(name) for name in criteria.split(",") if name.strip())
    if not folder.is_dir():
        raise InvalidInputError(f"{folder}: expected a directory of images")
    if not names:
        raise InvalidInputError("--criteria: expected one criterion or more, got none")
    files = find_image_files([folder], leave_out=leave_out)
    if len(files) < 2:
        raise InvalidInputError(f"{folder}: expected two images or more, found one")
    return _DemoImages(files, names, prompt)


def _make_bases(
    step: Callable[[str], None], path: Path, given: _DemoImages, llm: str | None, directory: Path,
    generate: bool, fresh: bool,
) -> dict[str, Basis]:  # fmt: skip
    """Make a basis per criterion from the language model's texts, and one from the true words."""
    bases: dict[str, Basis] = {}
    with Embedder.open(path) as embedder:
        if generate:
            step("asking the language model for texts")
            for name in given.criteria:
                basis = _generate_or_reuse(
                    name, llm, embedder, given.prompt, directory / "bases", fresh
                )
                if basis is not None:
                    bases[name] = basis
            bases = _against_each_other(embedder, bases, given.prompt)
        for name, words in given.words.items():
            true = _TRUE_WORDS.format(name)
            bases[true] = embedder.create_basis(true, list(words), prompts=[given.prompt])
    if not bases:
        raise GenerationError(
            "there is no basis to group by: the language model wrote no texts for any criterion"
        )
    return bases


def _against_each_other(
    embedder: Embedder, bases: dict[str, Basis], prompt: str
) -> dict[str, Basis]:
    """Make each basis again so that the texts of the others count less."""
    if len(bases) < 2:
        return bases
    return {
        name: embedder.create_basis(
            name, list(basis.texts), prompts=[prompt], provenance=basis.provenance, load=False,
            against=[other for criterion, other in bases.items() if criterion != name],
        )
        for name, basis in bases.items()
    }  # fmt: skip


def _generate_or_reuse(
    name: str, llm: str | None, embedder: Embedder, prompt: str, kept: Path, fresh: bool
) -> Basis | None:
    """Return a basis from the language model, or one from an earlier run. None if that fails."""
    key = hashlib.sha256(f"{embedder.bundle.fingerprint} {llm} {prompt}".encode()).hexdigest()
    file = kept / f"{name}.{key[:12]}{SUFFIX}"
    if file.exists() and not fresh:
        try:
            basis = Basis.load(file)
            note(f"{name}: using the texts of an earlier run ({file}); --fresh asks again")
        except CrlError:
            return _generate_or_reuse(name, llm, embedder, prompt, kept, fresh=True)
    else:
        try:
            texts = generation.generate_texts(embedder, name, llm, prompts=[prompt])
            basis = embedder.create_basis(name, texts, prompts=[prompt])
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
    """Embed images with a server in a separate process. Return the seconds and the embeddings."""
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
        raise InvalidInputError("expected two images or more that can be read: check the files")
    return seconds, result


def _group(
    given: _DemoImages, bases: dict[str, Basis], result: Embeddings, count: int
) -> tuple[list[ReportSection], list[dict[str, Any]]]:
    """Group the images by each criterion. Return sections of the report and rows of the table."""
    sections, rows = [], []
    good = [i for i in range(len(given.files)) if i not in result.errors]
    universal = result.universal[good]
    for name in given.criteria:
        own = _TRUE_WORDS.format(name)
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
            raise InvalidInputError(
                f"{directory}: cannot be written ({error.strerror or error}); choose an empty "
                "directory"
            ) from error
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
        table.add_column("groups and their number of images")
        for row in rows:
            groups = ", ".join(f"{name} {size}" for name, size in row["groups"].items())
            table.add_row(row["criterion"], escape(groups))
    else:
        table.title = f"Clustering accuracy on {summary['images']} images"
        table.add_column("universal embedding", justify="right")
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
        f"{summary['images_per_second']} images per second over gRPC, including decoding; "
        f"{summary['seconds']} s in total"
    )
