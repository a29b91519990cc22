"""`crl retrieve`: find the images nearest to a query by criteria, or like it but with something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._methods import PAPER_METHOD
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, note, out, print_json
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    FormatsOption,
    PasswordOption,
    ThreadsOption,
    load_basis,
)
from crl_sdk.cli._sources import LazyEmbedder, require_same_model
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored._directory import UNIVERSAL
from crl_sdk.tasks._retrieval import PAPER_WEIGHT, Index, condition_captions
from crl_sdk.vector_stores._address import StoreAddress, parse_address
from crl_sdk.vector_stores._open import open_store
from crl_sdk.vector_stores._search import open_record, require_searchable, search_store


def retrieve(
    query: Annotated[Path, typer.Argument(help="The image to compare with.")],
    source: Annotated[
        Path | None,
        typer.Argument(help="Where to search: a directory of images or stored embeddings."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--from", help="Vector store to search instead, such as `lancedb:DIR` (`crl store`)."
        ),
    ] = None,
    password: PasswordOption = "",
    criteria: Annotated[
        str,
        typer.Option(
            help="Criteria with optional non-zero weights (default 1), such as `color:2, shape`."
        ),
    ] = "",
    but_with: Annotated[
        str,
        typer.Option(
            "--but-with", help="Find images of the query's scene, but with this: `a dog`."
        ),
    ] = "",
    scene: Annotated[
        str, typer.Option(help="With --but-with: the criterion that describes scenes.")
    ] = "scene",
    scene_weight: Annotated[
        float | None,
        typer.Option(
            help="With --but-with: weight of the scene. Default: 10 for a basis made by `cosine`, "
            "as in the paper; otherwise such that scene and words count equally."
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Largest number of results.")] = 10,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Prompt for the language model's texts, with one {}. Default: what the bundle "
            "recommends."
        ),
    ] = None,
    llm: generation.LlmOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    as_json: JsonOption = False,
) -> None:
    """Find the images nearest to a query. The query itself is left out of the results.

    Bases are read from --bases. If there is none for a criterion, the local language model writes
    its texts. Images that cannot be read are listed and left out, and the exit status is then 1.

    With --from, the store is asked for each criterion. There `universal` is a criterion too: the
    plain embeddings, which are compared if no --criteria are given.
    """
    if (source is None) == (store is None):
        raise InvalidInputError(
            "expected where to search: a directory or stored embeddings, or --from STORE; got "
            + ("neither" if source is None else "both")
        )
    if store is not None:
        if but_with.strip():
            raise InvalidInputError(
                "--but-with compares all images, which a store does not: name the stored "
                "embeddings instead of --from"
            )
        with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
            _retrieve_from_store(
                model, query, parse_address(store, password), criteria, count, bases, as_json
            )
        return
    assert source is not None
    if bool(criteria.strip()) == bool(but_with.strip()):
        raise InvalidInputError(
            "expected --criteria 'color:2, shape', or --but-with 'a dog' with --scene"
        )
    weights = parse_weights(criteria) if criteria.strip() else {normalise_criterion(scene): 1.0}
    with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
        queries = model.embed_files([query])
        images = model.read([source])
        loaded = [
            model.find_or_make_basis(name, bases, queries.fingerprint, prompt=prompt, llm=llm)
            for name in weights
        ]
        require_same_model(queries, loaded)
        require_same_model(images, loaded)
        condition = None
        if but_with.strip():
            condition = model.embedder.embed_text(condition_captions(but_with))
    index = Index.project(images.universal, loaded)
    rows = {basis.criterion: basis.projection.apply(queries.universal) for basis in loaded}
    own = [i for i, name in enumerate(images.names) if _same_file(Path(name), query)]
    if condition is None:
        found = index.nearest(rows, weights, count + len(own))
    else:
        weight = scene_weight
        if weight is None and loaded[0].method == PAPER_METHOD:
            weight = PAPER_WEIGHT
        name = loaded[0].criterion
        found = index.but_with(rows[name], condition, scene=name, weight=weight, n=count + len(own))
    results: list[dict[str, Any]] = [
        {
            "file": images.names[position],
            "score": float(found.scores[rank]),
            "parts": {name: float(values[rank]) for name, values in found.parts.items()},
        }
        for rank, position in enumerate(found.positions)
        if position not in own
    ][:count]
    asked = (str(query), dict(found.weights), but_with or None)
    _show(asked, len(index), results, images.failed, as_json)
    if images.failed:
        raise typer.Exit(1)


def _show(
    asked: tuple[str, dict[str, float], str | None],
    size: int,
    results: list[dict[str, Any]],
    failed: list[dict[str, str]],
    as_json: bool,
) -> None:
    query, weights, but_with = asked
    if as_json:
        print_json(
            {
                "query": query,
                "weights": weights,
                "but_with": but_with,
                "images": size,
                "results": results,
                "failed": failed,
            }
        )
        return
    names = [f"{name} × {weight:.3g}" for name, weight in weights.items()]
    shown = Table("")
    shown.add_column("file", overflow="fold")
    for heading in ("score", *names):
        shown.add_column(heading, justify="right")
    for rank, result in enumerate(results):
        parts = (f"{value:.3f}" for value in result["parts"].values())
        shown.add_row(str(rank + 1), escape(result["file"]), f"{result['score']:.3f}", *parts)
    out.print(shown)


def _retrieve_from_store(
    model: LazyEmbedder,
    query: Path,
    address: StoreAddress,
    criteria: str,
    count: int,
    bases: Path,
    as_json: bool,
) -> None:
    weights = parse_weights(criteria) if criteria.strip() else {UNIVERSAL: 1.0}
    with open_store(address, create=False) as opened:
        record = open_record(opened)
        queries = model.embed_files([query])
        fingerprint = queries.fingerprint or ""
        loaded = {
            name: load_basis(bases, name, fingerprint, model.bundle)
            for name in weights
            if name != UNIVERSAL
        }
        require_searchable(
            opened, record, list(loaded.values()), fingerprint, universal=UNIVERSAL in weights
        )
        rows = {
            name: loaded[name].projection.apply(queries.universal)
            if name in loaded
            else queries.universal
            for name in weights
        }
        found = search_store(opened, rows, weights, count + 1)
        size = opened.count()
    if not found.complete:
        note(
            f"the nearest {found.candidates} images of each criterion were compared; others may "
            "score as high"
        )
    results: list[dict[str, Any]] = [
        {
            "file": path,
            "id": found.ids[rank],
            "score": float(found.scores[rank]),
            "parts": {name: float(values[rank]) for name, values in found.parts.items()},
        }
        for rank, path in enumerate(found.paths)
        if not _same_file(Path(path), query)
    ][:count]
    _show((str(query), dict(found.weights), None), size, results, [], as_json)


def parse_weights(criteria: str) -> dict[str, float]:
    """Return the weight of each criterion in a text such as `color:2, shape`.

    Args:
        criteria: Criteria separated by commas, each with an optional weight. The default is 1.

    Raises:
        CriterionError: If the name of a criterion is malformed.
        InvalidInputError: If a weight is not a number other than 0, or a criterion occurs twice.

    Example:
        >>> from crl_sdk.cli._retrieve import parse_weights
        >>> parse_weights("color:2, shape")
        {'color': 2.0, 'shape': 1.0}
    """
    weights: dict[str, float] = {}
    for part in criteria.split(","):
        if not part.strip():
            continue
        name, colon, number = part.partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not math.isfinite(weight) or weight == 0:
            raise InvalidInputError(
                f"--criteria: expected a number other than 0 after ':', such as 'color:2', got "
                f"{part.strip()!r}"
            )
        if weights.setdefault(normalise_criterion(name), weight) != weight:
            raise InvalidInputError(f"--criteria: {name.strip()!r} occurs twice: keep one")
    return weights


def _same_file(path: Path, query: Path) -> bool:
    try:
        return path.samefile(query)
    except OSError:
        return False
