"""`crl retrieve`: the pictures nearest to one, by criteria; or like it, but with something else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.basis._methods import PAPER_METHOD
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, out, print_json
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    ThreadsOption,
)
from crl_sdk.cli._sources import (
    PromptOption,
    require_same_model,
    workbench,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.tasks._retrieval import PAPER_WEIGHT, Index, condition_captions


def retrieve(
    query: Annotated[Path, typer.Argument(help="The picture to compare with.")],
    source: Annotated[
        Path, typer.Argument(help="Where to look: a directory of pictures, or stored embeddings.")
    ],
    criteria: Annotated[
        str, typer.Option(help="By what, with weights: 'color:2, shape'; not 0, 1 if not given.")
    ] = "",
    but_with: Annotated[
        str, typer.Option("--but-with", help="Like the picture's scene, but with this: 'a dog'.")
    ] = "",
    scene: Annotated[
        str, typer.Option(help="With --but-with: the criterion that says what a scene is.")
    ] = "scene",
    scene_weight: Annotated[
        float | None,
        typer.Option(
            help="With --but-with: of the scene; by default 10, as in the paper, for a basis by "
            "`cosine`, else so much that scene and words count alike."
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures at most.")] = 10,
    prompt: PromptOption = DEFAULT_PROMPT,
    llm: generation.LlmOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    as_json: JsonOption = False,
) -> None:
    """Find the pictures nearest to one; it is left out itself if it is among them.

    Bases are taken from the directory of bases; where there is none of a criterion, the local
    language model writes its texts. Unreadable pictures are named and left out, and the exit
    status is then 1.
    """
    if bool(criteria.strip()) == bool(but_with.strip()):
        raise InvalidInputError(
            "expected --criteria 'color:2, shape', or --but-with 'a dog' with --scene"
        )
    weights = parse_weights(criteria) if criteria.strip() else {normalise_criterion(scene): 1.0}
    with workbench(bundle, engine, threads, decode) as bench:
        asked = bench.pictures([query])
        material = bench.material([source])
        loaded = [bench.basis(name, bases, prompt=prompt, llm=llm) for name in weights]
        require_same_model(asked, loaded)
        require_same_model(material, loaded)
        condition = (
            bench.embedder.embed_text(condition_captions(but_with)) if but_with.strip() else None
        )
    index = Index.project(material.universal, loaded)
    rows = {basis.criterion: basis.projection.apply(asked.universal) for basis in loaded}
    own = [i for i, name in enumerate(material.names) if _same(Path(name), query)]
    if condition is None:
        hits = index.nearest(rows, weights, count + len(own))
    else:
        weight = scene_weight
        if weight is None and loaded[0].method == PAPER_METHOD:
            weight = PAPER_WEIGHT
        name = loaded[0].criterion
        hits = index.but_with(rows[name], condition, scene=name, weight=weight, n=count + len(own))
    found: list[dict[str, Any]] = [
        {
            "file": material.names[position],
            "score": float(hits.scores[rank]),
            "parts": {name: float(values[rank]) for name, values in hits.parts.items()},
        }
        for rank, position in enumerate(hits.positions)
        if position not in own
    ][:count]
    if as_json:
        print_json(
            {
                "query": str(query),
                "weights": dict(hits.weights),
                "but_with": but_with or None,
                "pictures": len(index),
                "hits": found,
                "failed": material.failed,
            }
        )
    else:
        names = [f"{name} × {weight:.3g}" for name, weight in hits.weights.items()]
        shown = Table("")
        shown.add_column("file", overflow="fold")
        for heading in ("score", *names):
            shown.add_column(heading, justify="right")
        for rank, hit in enumerate(found):
            parts = (f"{value:.3f}" for value in hit["parts"].values())
            shown.add_row(str(rank + 1), escape(hit["file"]), f"{hit['score']:.3f}", *parts)
        out.print(shown)
    if material.failed:
        raise typer.Exit(1)


def parse_weights(criteria: str) -> dict[str, float]:
    """Read `color:2, shape` as criterion → weight, 1 where none is given.

    Raises:
        CriterionError: a name is malformed.
        InvalidInputError: a weight is not a number other than 0, or a criterion is there twice.
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
            raise InvalidInputError(f"--criteria: {name.strip()!r} is there twice")
    return weights


def _same(path: Path, query: Path) -> bool:
    try:
        return path.samefile(query)
    except OSError:
        return False
