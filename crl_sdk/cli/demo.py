"""`crl demo` and `crl demo-data`: pictures with known answers, regrouped by each criterion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from crl_sdk.basis import Basis
from crl_sdk.bundle import demo_bundle
from crl_sdk.cli import generation
from crl_sdk.cli.console import JsonOption, note, out, print_json, progress_bar, warn
from crl_sdk.embedder import Embedder
from crl_sdk.errors import GenerationError, InvalidInputError, MissingDependencyError
from crl_sdk.generate import Recipe


def demo_data(
    directory: Annotated[Path, typer.Argument(help="Directory to fill; made if missing.")],
    count: Annotated[int, typer.Option("-n", min=1, max=1_000_000, help="Pictures.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal pictures.")] = 0,
) -> None:
    """Render scenes of the demo world as JPEG files, with their factors in labels.csv."""
    note(f"wrote {_render(directory, count, seed)}")


def demo(
    count: Annotated[int, typer.Option("-n", min=100, max=20_000, help="Pictures.")] = 1500,
    directory: Annotated[
        Path, typer.Option("--out", "-o", help="Where to render them; reused if it is there.")
    ] = Path("demo-output"),
    generate: Annotated[
        bool, typer.Option(help="Let the language model write the texts, beside the true ones.")
    ] = True,
    model: generation.ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cluster rendered scenes by each criterion: the universal embedding against conditional ones.

    A small language model turns each criterion into texts; beside them, the words the scenes were
    made from. The pictures are held out of the demo model's training. Accuracy is that of k-means
    with the true number of clusters, under the best assignment of clusters to labels, seeds 0-4.
    """
    with _needs_tasks():
        from crl_export.demo.captions import NEUTRAL_PROMPT
        from crl_export.demo.dataset import TEST_SEED, labels_of, read_labels
        from crl_export.demo.evaluate import kmeans_accuracy, own_words
        from crl_export.demo.world import CRITERIA

    with _needs_tasks(), Embedder.open(demo_bundle()) as embedder:
        bases: dict[str, Basis] = {}
        texts = {name: list(own_words(name)) for name in CRITERIA}
        for name in CRITERIA:
            bases[name] = embedder.create_basis(name, texts[name], prompts=[NEUTRAL_PROMPT])
            if generate:
                written = _generate(name, model, embedder, NEUTRAL_PROMPT)
                if written is not None:
                    bases[f"{name} generated"] = written

        folder = directory / f"scenes-{count}"
        if not (folder / "labels.csv").exists():
            _render(folder, count, TEST_SEED)
        files, codes = read_labels(folder / "labels.csv")
        labels = labels_of(codes)
        with progress_bar() as progress:
            task = progress.add_task("embedding", total=len(files))
            started = time.perf_counter()
            result = embedder.embed(
                files,
                list(bases.values()),
                progress=lambda done: progress.update(task, completed=done),
            )
            seconds = time.perf_counter() - started
            task = progress.add_task("clustering", total=len(CRITERIA))
            rows: list[dict[str, Any]] = []
            for name in CRITERIA:
                row: dict[str, Any] = {
                    "criterion": name,
                    "universal": kmeans_accuracy(result.universal, labels[name]),
                    "true_words": kmeans_accuracy(result[name], labels[name]),
                }
                if f"{name} generated" in bases:
                    rows_of = result[f"{name} generated"]
                    row["generated"] = kmeans_accuracy(rows_of, labels[name])
                    row["texts"] = list(bases[f"{name} generated"].texts)
                rows.append(row)
                progress.advance(task)
        summary = {
            "images": len(files),
            "images_per_second": round(len(files) / seconds, 1),
            "engine": embedder.engine,
            "pictures": str(folder),
            "prompt": NEUTRAL_PROMPT,
            "criteria": rows,
        }
    if as_json:
        print_json(summary)
    else:
        _print_table(summary)


def _generate(name: str, model: str | None, embedder: Embedder, prompt: str) -> Basis | None:
    """Let the language model write a criterion's texts; None, with a warning, if it cannot."""
    try:
        draft = generation.draft(name, model, Recipe(), embedder.embed_text, [prompt])
    except GenerationError as error:
        warn(str(error))
        return None
    basis = embedder.create_basis(
        f"{name} generated",
        [candidate.text for candidate in draft.texts],
        prompts=[prompt],
        provenance=draft.provenance,
    )
    out.print(f"[bold]{name}[/]: {', '.join(basis.texts)}", highlight=False)
    return basis


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
    table = Table(
        title=f"Clustering accuracy on {summary['images']} pictures in {summary['pictures']}",
        title_justify="left",
    )
    table.add_column("criterion")
    table.add_column("universal", justify="right")
    table.add_column("conditional, texts from the language model", justify="right", style="bold")
    table.add_column("conditional, true words", justify="right")
    for row in summary["criteria"]:
        generated = f"{row['generated']:.3f}" if "generated" in row else "none"
        table.add_row(
            row["criterion"], f"{row['universal']:.3f}", generated, f"{row['true_words']:.3f}"
        )
    out.print(table)
    note(
        f"every picture embedded once for all criteria, {summary['images_per_second']} a second "
        f"on {summary['engine']}, decoding included"
    )
