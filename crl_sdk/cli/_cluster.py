"""`crl cluster`: pictures, or stored embeddings, in named groups by one criterion."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, note, out, print_json, spinner, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    ThreadsOption,
)
from crl_sdk.cli._report import write_report
from crl_sdk.cli._report_content import (
    ReportSection,
    describe_cluster_count,
    described_groups,
)
from crl_sdk.cli._sources import (
    BasisOption,
    CriterionOption,
    Material,
    PromptOption,
    TextsOption,
    require_same_model,
    require_tasks,
    workbench,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.storage._atomic_files import make_directory, write_atomically
from crl_sdk.tasks._cluster_quality import ClusterQuality, assess_clusters
from crl_sdk.tasks._clustering import Clustering
from crl_sdk.tasks._clustering import cluster as cluster_rows
from crl_sdk.tasks._kmeans import MAX_CLUSTERS, check_rows

TABLE, REPORT = "clusters.csv", "report.html"


def cluster(
    source: Annotated[
        Path,
        typer.Argument(
            help="A directory of pictures; or embeddings: .npz or .parquet of `crl embed`, .npy."
        ),
    ],
    criterion: CriterionOption = "",
    k: Annotated[
        int | None, typer.Option("--k", "-k", min=1, help="Clusters; chosen if not given.")
    ] = None,
    max_k: Annotated[
        int, typer.Option("--max-k", min=2, help="Clusters at most, where they are chosen.")
    ] = MAX_CLUSTERS,
    directory: Annotated[
        Path, typer.Option("--out", "-o", help=f"For {TABLE} and {REPORT}; made if missing.")
    ] = Path("clusters"),
    basis_file: BasisOption = None,
    texts: TextsOption = None,
    prompt: PromptOption = DEFAULT_PROMPT,
    llm: generation.LlmOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal clusters.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Group pictures by a criterion in words, name the groups, and write a table and a report.

    Without --basis or --texts the criterion's basis is taken from the directory of bases; if there
    is none, the local language model writes its texts. Unreadable pictures are named and left out,
    and the exit status is then 1.
    """
    require_tasks("crl cluster")
    with workbench(bundle, engine, threads, decode) as bench:
        material = bench.material([source])
        basis = bench.basis(criterion, bases, file=basis_file, texts=texts, prompt=prompt, llm=llm)
    require_same_model(material, [basis])
    with spinner("grouping …"):
        universal = check_rows(material.universal)
        rows = project_rows(universal, [basis.projection])[0]
        found = cluster_rows(rows, k, basis=basis, universal=universal, max_k=max_k, seed=seed)
        trust = assess_clusters(universal, rows, basis.text_embeddings, seed=seed)
        doubts = (*trust.reasons, *_unlike_any(found))
    make_directory(directory, InvalidInputError)
    write_atomically(directory / TABLE, _csv(material, found), InvalidInputError)
    page = None
    if material.files is not None:
        page = directory / REPORT
        _write_report(page, material, basis, found, universal, doubts)
    _tell(material, basis, found, trust, doubts, directory / TABLE, page, as_json)
    if material.failed:
        raise typer.Exit(1)


def _unlike_any(found: Clustering) -> tuple[str, ...]:
    """Tell of groups that no text sets apart."""
    count = sum(each.name is not None and not each.name.fits for each in found.clusters)
    if not count:
        return ()
    return (
        f"{count} of {len(found.clusters)} groups {'are' if count > 1 else 'is'} like none of the "
        "texts: a word for what pictures there share may be missing",
    )


def _csv(material: Material, found: Clustering) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "cluster", "name", "distance", "typicality"])
    for i, name in enumerate(material.names):
        number = int(found.labels[i])
        writer.writerow(
            [name, number + 1, _name(found, number), f"{found.distances[i]:.6f}",
             f"{found.typicality[i]:.4f}"]
        )  # fmt: skip
    return text.getvalue().encode("utf-8", "surrogateescape")


def _write_report(
    page: Path, material: Material, basis: Basis, found: Clustering, universal: Any,
    doubts: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the demo's page: on the left what the universal embeddings would group."""
    assert material.files is not None
    plain = cluster_rows(universal, len(found.clusters), basis=basis, universal=universal)
    section = ReportSection(
        criterion=basis.criterion,
        texts=basis.texts,
        generated="model" in basis.provenance,
        universal=described_groups(plain),
        conditional=described_groups(found),
        remark=describe_cluster_count(found.choice, found.stability),
        reasons=doubts,
    )
    title = f"{len(material.names)} images, grouped by {basis.criterion}"
    write_report(page, title, [section], material.files)


def _tell(
    material: Material, basis: Basis, found: Clustering, trust: ClusterQuality,
    doubts: tuple[str, ...], table: Path, page: Path | None, as_json: bool,
) -> None:  # fmt: skip
    choice = found.choice
    if as_json:
        print_json(
            {
                "pictures": len(material.names),
                "failed": material.failed,
                "criterion": basis.criterion,
                "texts": list(basis.texts),
                "fingerprint": basis.fingerprint,
                "basis_sha256": basis.sha256(),
                "k": found.k,
                "chosen": None
                if choice is None
                else {
                    "agreement": choice.agreement,
                    "margin": choice.margin,
                    "runner_up": choice.runner_up,
                    "weak": choice.weak,
                    "silhouettes": {str(k): value for k, value in choice.silhouettes.items()},
                    "resamples": choice.resamples,
                    "resample_rows": choice.resample_rows,
                },
                "stability": found.stability,
                "trust": {
                    "separation": trust.separation,
                    "stability": trust.stability,
                    "doubts": list(doubts),
                },
                "clusters": [_document(material, found, i) for i in range(len(found.clusters))],
                "table": str(table),
                "report": None if page is None else str(page),
            }
        )
        return
    shown = Table("cluster", "name", "pictures", "cohesion", "apart by", "most typical")
    for i, each in enumerate(found.clusters):
        strength = each.name.strengths[0] if each.name is not None else 0.0
        shown.add_row(
            str(i + 1), escape(_name(found, i)), str(each.size), f"{each.cohesion:.2f}",
            f"{strength:.1f} σ", escape(Path(material.names[each.typical[0]]).name),
        )  # fmt: skip
    out.print(shown)
    if told := describe_cluster_count(choice, found.stability):
        note(told)
    if len(found.clusters) < found.k:
        warn(
            f"{found.k} clusters were asked for, there are {len(found.clusters)}: so few pictures "
            "are distinct"
        )
    for doubt in doubts:
        warn(f"{basis.criterion}: {doubt}")
    out.print(f"{table}" + ("" if page is None else f" and {page}"), highlight=False)


def _document(material: Material, found: Clustering, number: int) -> dict[str, Any]:
    each = found.clusters[number]
    return {
        "cluster": number + 1,
        "name": _name(found, number),
        "texts": [] if each.name is None else list(each.name.texts),
        "strengths": [] if each.name is None else list(each.name.strengths),
        "fits": each.name is None or each.name.fits,
        "size": each.size,
        "cohesion": each.cohesion,
        "typical": [material.names[i] for i in each.typical],
        "edge": [material.names[i] for i in each.edge],
    }


def _name(found: Clustering, number: int) -> str:
    name = found.clusters[number].name
    return "" if name is None else name.text
