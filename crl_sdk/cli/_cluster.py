"""`crl cluster`: group images or stored embeddings by a criterion, and name the groups."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, note, out, print_json, spinner, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    AgainstOption,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    FormatsOption,
    OverwriteOption,
    ThreadsOption,
    require_new,
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
    ImageSource,
    LazyEmbedder,
    PromptOption,
    TextsOption,
    require_same_model,
    require_tasks,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.storage._atomic_files import make_directory, write_atomically
from crl_sdk.tasks._cluster_quality import ClusterQuality, assess_clusters
from crl_sdk.tasks._clustering import Clustering
from crl_sdk.tasks._clustering import cluster as cluster_rows
from crl_sdk.tasks._kmeans import MAX_CLUSTERS, check_rows
from crl_sdk.tasks._sharpen import ENOUGH_IMAGES
from crl_sdk.tasks._sharpen import sharpen as sharpen_basis

TABLE, REPORT = "clusters.csv", "report.html"


def cluster(
    source: Annotated[
        Path,
        typer.Argument(
            help="A directory of images, or a file of embeddings: .npz or .parquet from "
            "`crl embed`, or .npy."
        ),
    ],
    criterion: CriterionOption = "",
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", min=1, help="Number of groups. Default: chosen by silhouette."),
    ] = None,
    max_k: Annotated[
        int, typer.Option("--max-k", min=2, help="Largest number of groups to choose without --k.")
    ] = MAX_CLUSTERS,
    directory: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help=f"Directory for {TABLE} and {REPORT}. Created if missing."
        ),
    ] = Path("clusters"),
    basis_file: BasisOption = None,
    texts: TextsOption = None,
    prompt: PromptOption = None,
    llm: generation.LlmOption = None,
    against: AgainstOption = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    sharpen: Annotated[
        bool,
        typer.Option(
            help="Sharpen the basis with these images before they are grouped, if it is of the "
            f"method contrastive, was not sharpened yet, and there are {ENOUGH_IMAGES} images or "
            "more."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal groups.")] = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Group images by a criterion in words, and name the groups.

    The result is a table and, for image files, a report. Without --basis and --texts, the basis
    of the criterion is read from --bases. If it is not there, the local language model writes its
    texts. With enough images, the basis is sharpened with them for this command. Images that
    cannot be read are listed and left out, and the exit status is then 1.
    """
    require_tasks("crl cluster")
    if directory.is_dir():
        require_new(directory / TABLE, directory / REPORT, overwrite=overwrite)
    with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
        images = model.read([source])
        basis = model.find_or_make_basis(
            criterion, bases, images.fingerprint,
            file=basis_file, texts=texts, prompt=prompt, llm=llm,
            against=against or (),
        )  # fmt: skip
    require_same_model(images, [basis])
    with spinner("grouping …"):
        universal = check_rows(images.universal)
        doubts: tuple[str, ...] = ()
        if sharpen and _can_be_sharpened(basis, len(universal)):
            sharpened = sharpen_basis(basis, universal, source=str(source), seed=seed)
            basis, doubts = sharpened.basis, sharpened.reasons
        rows = project_rows(universal, [basis.projection])[0]
        found = cluster_rows(rows, k, basis=basis, universal=universal, max_k=max_k, seed=seed)
        quality = assess_clusters(universal, rows, basis.text_embeddings, seed=seed)
        reasons = (*quality.reasons, *doubts, *_undescribed_groups(found, quality))
    make_directory(directory, InvalidInputError)
    write_atomically(directory / TABLE, _csv(images, found), InvalidInputError)
    page = None
    if images.files is not None:
        page = directory / REPORT
        _write_report(page, images, basis, found, universal, reasons)
    if as_json:
        print_json(_document(images, basis, found, quality, reasons, directory / TABLE, page))
    else:
        _print(images, basis, found, reasons, directory / TABLE, page)
    if images.failed:
        raise typer.Exit(1)


def _can_be_sharpened(basis: Basis, images: int) -> bool:
    """Whether a basis fits and was not sharpened before, perhaps with labels."""
    fits = basis.method == "contrastive" and "sharpened" not in basis.provenance
    return fits and images >= ENOUGH_IMAGES


def _undescribed_groups(found: Clustering, quality: ClusterQuality) -> tuple[str, ...]:
    """Return a sentence about groups that no text describes, if too few images were checked."""
    count = sum(each.name is not None and not each.name.fits for each in found.clusters)
    if not count or quality.undescribed is not None:
        return ()
    return (
        f"no text describes {count} of {len(found.clusters)} groups: a text for what the images "
        f"of {'these groups' if count > 1 else 'this group'} have in common may be missing",
    )


def _csv(images: ImageSource, found: Clustering) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "cluster", "name", "distance", "typicality"])
    for i, name in enumerate(images.names):
        number = int(found.labels[i])
        writer.writerow(
            [name, number + 1, _name(found, number), f"{found.distances[i]:.6f}",
             f"{found.typicality[i]:.4f}"]
        )  # fmt: skip
    return text.getvalue().encode("utf-8", "surrogateescape")


def _write_report(
    page: Path, images: ImageSource, basis: Basis, found: Clustering, universal: Any,
    reasons: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the report, which also shows groups of the universal embeddings for comparison."""
    assert images.files is not None
    plain = cluster_rows(universal, len(found.clusters), basis=basis, universal=universal)
    section = ReportSection(
        criterion=basis.criterion,
        texts=basis.texts,
        generated="model" in basis.provenance,
        universal=described_groups(plain),
        conditional=described_groups(found),
        remark=describe_cluster_count(found.choice, found.stability),
        reasons=reasons,
    )
    title = f"{len(images.names)} images, grouped by {basis.criterion}"
    write_report(page, title, [section], images.files, model=images.model, warning=images.warning)


def _document(
    images: ImageSource, basis: Basis, found: Clustering, quality: ClusterQuality,
    reasons: tuple[str, ...], table: Path, page: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the result as JSON values."""
    choice = found.choice
    return {
        "images": len(images.names),
        "failed": images.failed,
        "criterion": basis.criterion,
        "texts": list(basis.texts),
        "fingerprint": basis.fingerprint,
        "model": images.model or None,
        "warning": images.warning,
        "basis_sha256": basis.sha256(),
        "sharpened": basis.provenance.get("sharpened"),
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
        "quality": {
            "separation": quality.separation,
            "undescribed": quality.undescribed,
            "reasons": list(reasons),
        },
        "clusters": [_cluster_document(images, found, i) for i in range(len(found.clusters))],
        "table": str(table),
        "report": None if page is None else str(page),
    }


def _print(
    images: ImageSource, basis: Basis, found: Clustering, reasons: tuple[str, ...],
    table: Path, page: Path | None,
) -> None:  # fmt: skip
    """Print the result as a table, with notes and warnings."""
    shown = Table("group", "name", "images", "cohesion", "name strength")
    shown.add_column("most typical image", overflow="fold")
    for i, each in enumerate(found.clusters):
        strength = each.name.strengths[0] if each.name is not None else 0.0
        shown.add_row(
            str(i + 1), escape(_name(found, i)), str(each.size), f"{each.cohesion:.2f}",
            f"{strength:.1f} σ", escape(Path(images.names[each.typical[0]]).name),
        )  # fmt: skip
    out.print(shown)
    if remark := describe_cluster_count(found.choice, found.stability):
        note(remark)
    if len(found.clusters) < found.k:
        warn(
            f"expected {found.k} groups, got {len(found.clusters)}, because only that many images "
            "are distinct"
        )
    for reason in reasons:
        warn(f"{basis.criterion}: not reliable: {reason}")
    out.print(f"{table}" + ("" if page is None else f" and {page}"), highlight=False)


def _cluster_document(images: ImageSource, found: Clustering, number: int) -> dict[str, Any]:
    each = found.clusters[number]
    return {
        "cluster": number + 1,
        "name": _name(found, number),
        "texts": [] if each.name is None else list(each.name.texts),
        "strengths": [] if each.name is None else list(each.name.strengths),
        "fits": each.name is None or each.name.fits,
        "size": each.size,
        "cohesion": each.cohesion,
        "typical": [images.names[i] for i in each.typical],
        "edge": [images.names[i] for i in each.edge],
    }


def _name(found: Clustering, number: int) -> str:
    name = found.clusters[number].name
    return "" if name is None else name.text
