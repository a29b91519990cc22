"""`make bench-stores`: vector stores beside the exact `Index`, on embeddings of a real CLIP model.

Every store gets the same rows and the same queries in one run: pictures of four sets, of which 100
are held out as queries. Recall@10 is the share of the ten best rows of `Index` that the store
finds. It is 1 for a store that compares all rows, so that anything less is the loss of its graph.

The vectors are not part of this project; the page says so and stays as it is without them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_benchmarks.postgres_server import PASSWORD, USER, Postgres
from crl_benchmarks.qdrant_edge import QdrantEdge
from crl_sdk import Basis
from crl_sdk.basis import Method, build_basis_from_vectors
from crl_sdk.tasks import Index
from crl_sdk.vector_stores import (
    StoreAddress,
    StoredRows,
    VectorStore,
    open_store,
    search_store,
    store_embeddings,
)

COMMAND = "make bench-stores"
MODEL = "openai/clip-vit-base-patch32"
SETS = ("dress", "sun397", "imagenet4", "dtd")
CRITERIA: tuple[tuple[str, str, Method], ...] = (
    ("color", "colour", "orthogonal"),
    ("material", "material", "orthogonal"),
    ("object", "noun", "cosine"),
)
"""Criterion, kind of words, and projection method of each basis."""
QUERIES = 100
WEIGHTS: tuple[Mapping[str, float], ...] = (
    {"universal": 1.0},
    {"color": 1.0},
    {"object": 1.0},
    {"color": 2.0, "material": 1.0},
    {"object": 1.0, "color": -0.5},
)
LENGTHS = (10, 30, 100, 300)
WARM_UP = 3

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every store is asked.

    Attributes:
        ids: Ids of the rows.
        bases: Bases of the criteria.
        queries: Rows of all queries by criterion.
        exact: Ids of the ten best rows of each query, for each of `WEIGHTS`.
    """

    ids: Sequence[str]
    bases: Sequence[Basis]
    queries: Mapping[str, Rows]
    exact: Sequence[Sequence[set[str]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of one store.

    Attributes:
        name: Name of the store, with its version.
        load_rate: Rows per second, indexes included.
        megabytes: Size on the disk; None if it is not known.
        recall: Recall@10 for each of `WEIGHTS`.
        p50_ms: Median duration of a search for each of `WEIGHTS`.
        p99_ms: The 99th percentile.
        complete: Share of searches that ended with a certain result, for each of `WEIGHTS`.
        lengths: Recall@10 for each of `LENGTHS`, for the last two of `WEIGHTS`.
    """

    name: str
    load_rate: float
    megabytes: float | None
    recall: list[float]
    p50_ms: list[float]
    p99_ms: list[float]
    complete: list[float]
    lengths: list[list[float]]


def read_vectors(data: Path) -> tuple[Rows, Rows, list[Basis]]:
    """Return rows to store, rows of queries, and bases.

    Raises:
        FileNotFoundError: If the vectors are absent.
    """
    found = [np.load(data / f"openai-b32-{name}.npz")["image"] for name in SETS]
    images = np.concatenate(found).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    images = np.unique(images, axis=0)
    order = np.random.default_rng(0).permutation(len(images))
    words = np.load(data / "openai-b32-words.npz")
    bases = []
    for name, kind, method in CRITERIA:
        chosen = words["kind"] == kind
        texts, rows = words["word"][chosen].tolist(), words["text"][chosen]
        bases.append(build_basis_from_vectors(name, texts, rows, model=MODEL, method=method))
    return images[order[QUERIES:]], images[order[:QUERIES]], bases


@contextmanager
def stores(directory: Path) -> Iterator[list[tuple[str, Callable[[], VectorStore], Path]]]:
    """Yield the name of each store, a function that opens it, and where its files are."""
    with ExitStack() as stack:
        server = Postgres()
        stack.callback(server.close)
        server.start()
        postgres = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{server.port}/postgres#images"
        edge = StoreAddress("qdrant", "images", str(directory / "edge"))
        yield [
            (
                f"LanceDB {version('lancedb')}",
                lambda: open_store(f"lancedb:{directory / 'lance'}"),
                directory / "lance",
            ),
            (
                f"Qdrant's engine (qdrant-edge-py {version('qdrant-edge-py')})",
                lambda: QdrantEdge.open(edge),
                directory / "edge",
            ),
            ("PostgreSQL 18 with pgvector 0.8.5", lambda: open_store(postgres), server.data),
            (
                f"milvus-lite {version('milvus-lite')}",
                lambda: open_store(f"milvus:{directory / 'milvus.db'}"),
                directory / "milvus.db",
            ),
        ]


def project(queries: Rows, bases: Sequence[Basis]) -> dict[str, Rows]:
    """Return the rows of all queries by criterion."""
    rows = {basis.criterion: basis.projection.apply(queries) for basis in bases}
    return {"universal": queries, **rows}


def measure_store(
    name: str, opening: Callable[[], VectorStore], files: Path, source: StoredRows, task: Task
) -> Outcome:
    """Fill a store and search it."""
    with opening() as store:
        before = _bytes(files)
        report = store_embeddings(source, store, task.bases)
        size = (_bytes(files) - before) / 1e6
        recalls, p50, p99, complete = [], [], [], []
        for weights, best in zip(WEIGHTS, task.exact, strict=True):
            seconds, hits, certain = [], 0, 0
            for i in [*range(WARM_UP), *range(QUERIES)]:
                rows = {key: task.queries[key][i] for key in weights}
                started = time.perf_counter()
                found = search_store(store, rows, weights)
                seconds.append(time.perf_counter() - started)
                hits += len(best[i] & set(found.ids)) if len(seconds) > WARM_UP else 0
                certain += found.complete if len(seconds) > WARM_UP else 0
            recalls.append(hits / (10 * QUERIES))
            p50.append(1e3 * statistics.median(seconds[WARM_UP:]))
            p99.append(1e3 * float(np.percentile(seconds[WARM_UP:], 99)))
            complete.append(certain / QUERIES)
        lengths = [
            [_recall_of_length(store, task, which, length) for length in LENGTHS]
            for which in (3, 4)
            if not name.startswith("milvus")  # a search of milvus-lite takes long
        ]
    outcome = Outcome(name, report.new / report.seconds, size, recalls, p50, p99, complete, lengths)
    print(outcome, flush=True)
    return outcome


def _recall_of_length(store: VectorStore, task: Task, which: int, length: int) -> float:
    weights, hits = WEIGHTS[which], 0
    for i in range(QUERIES):
        rows = {key: task.queries[key][i] for key in weights}
        found = search_store(store, rows, weights, candidates=length)
        hits += len(task.exact[which][i] & set(found.ids))
    return hits / (10 * QUERIES)


def fuse_ranks(index: Index, task: Task, which: int, length: int) -> float:
    """Return the recall@10 of reciprocal rank fusion of exact lists, weighted, with k = 60."""
    hits = 0
    for i in range(QUERIES):
        scores: dict[int, float] = {}
        for name, weight in WEIGHTS[which].items():
            row = np.sign(weight) * task.queries[name][i]
            found = index.nearest({name: row}, n=length)
            for rank, position in enumerate(found.positions.tolist()):
                scores[position] = scores.get(position, 0.0) + abs(weight) / (60 + rank + 1)
        best = sorted(scores, key=lambda each: -scores[each])[:10]
        hits += len(task.exact[which][i] & {task.ids[each] for each in best})
    return hits / (10 * QUERIES)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # PostgreSQL is stopped on the way out
    try:
        images, held_out, bases = read_vectors(options.data)
    except FileNotFoundError as error:
        print(f"skipped: {error.filename} is absent")
        return
    ids = [f"picture {i}" for i in range(len(images))]
    queries = project(held_out, bases)
    index = Index({**project(images, bases)})
    exact, p50 = [], []
    for weights in WEIGHTS:
        seconds, best = [], []
        for i in range(QUERIES):
            started = time.perf_counter()
            found = index.nearest({key: queries[key][i] for key in weights}, weights)
            seconds.append(time.perf_counter() - started)
            best.append({ids[each] for each in found.positions.tolist()})
        exact.append(best)
        p50.append(1e3 * statistics.median(seconds))
    task = Task(ids, bases, queries, exact)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        source = directory / "source.npz"
        np.savez(
            source, path=np.array(ids), universal=images,
            fingerprint=np.array(bases[0].fingerprint),
        )  # fmt: skip
        with stores(directory) as opened:
            outcomes = [
                measure_store(name, opening, files, StoredRows.open(source), task)
                for name, opening, files in opened
            ]
    fused = [[fuse_ranks(index, task, which, length) for length in LENGTHS] for which in (3, 4)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    dims = {name: rows.shape[1] for name, rows in queries.items()}
    parts = [_head(len(images), dims), _searches(outcomes, p50), _lists(outcomes, fused)]
    options.out.write_text("\n".join(parts), encoding="utf-8")
    print(json.dumps({"peak_mib": round(peak), "rows": len(images), "out": str(options.out)}))


def _head(rows: int, dims: Mapping[str, int]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    values = ", ".join(f"{name} {dim}" for name, dim in dims.items())
    megabytes = sum(dims.values()) * 4 * rows / 1e6
    return f"""# Vector stores beside the exact index

`{COMMAND}`, commit {describe_commit()}. {machine}. All in one run.
Processes that wanted to run in the last 15 minutes: {os.getloadavg()[2]:.1f}. More than the cores
means that other work slowed all of this.

{rows:,} pictures of four sets, embedded by OpenAI's CLIP ViT-B/32; {QUERIES} others are the
queries. The vectors are not in this repository. Values of a row: {values}; {megabytes:,.0f} MB in
float32. Qdrant's server and Milvus's server were not run: there is no program of theirs here.
Qdrant's local mode compares all rows, so that it finds what `Index` finds.
"""


def _searches(outcomes: Sequence[Outcome], exact_p50: Sequence[float]) -> str:
    heads = ["", *map(_weights, WEIGHTS)]
    recall = [[each.name, *(f"{value:.3f}" for value in each.recall)] for each in outcomes]
    sure = [[each.name, *(f"{value:.0%}" for value in each.complete)] for each in outcomes]
    times = [
        [each.name, *(f"{a:.1f} / {b:.1f}" for a, b in zip(each.p50_ms, each.p99_ms, strict=True))]
        for each in outcomes
    ]
    times.insert(0, ["`Index`, which compares all rows", *(f"{value:.1f}" for value in exact_p50)])
    load = [[each.name, f"{each.load_rate:,.0f}", f"{each.megabytes:,.0f}"] for each in outcomes]
    return f"""
`search_store` asks for 100 rows of each criterion at first, and for more until the result is
certain. A weight below 0 prefers what differs.

## Recall@10

{table(heads, recall)}

Searches whose result was certain, before the list had 3,200 rows:

{table(heads, sure)}

## Milliseconds of a search, p50 / p99

{table(heads, times)}

## Load

{table(["", "rows per second, indexes included", "MB on the disk"], load)}
"""


def _lists(outcomes: Sequence[Outcome], fused: Sequence[Sequence[float]]) -> str:
    rows = [
        [each.name, _weights(WEIGHTS[3 + i]), *(f"{value:.3f}" for value in found)]
        for each in outcomes
        for i, found in enumerate(each.lengths)
    ] + [
        ["ranks of exact lists", _weights(WEIGHTS[3 + i]), *(f"{value:.3f}" for value in found)]
        for i, found in enumerate(fused)
    ]
    return f"""
## Length of the lists

Recall@10 if a store is asked once, for so many rows of each criterion, and exact scores are
merged. The last lines merge ranks instead of scores, as stores do themselves (reciprocal rank
fusion, k = 60, weighted), of lists without error.

{table(["", "weights", *map(str, LENGTHS)], rows)}
"""


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(
        name if weight == 1 else f"{name}:{weight:g}" for name, weight in weights.items()
    )


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


if __name__ == "__main__":
    main()
