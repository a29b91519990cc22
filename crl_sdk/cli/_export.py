"""`crl export`, `crl background` and `crl info`: make, complete and show a model bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

from crl_sdk.cli._basis import read_texts
from crl_sdk.cli._console import (
    JsonOption,
    note,
    out,
    plain_warnings,
    print_facts,
    print_json,
    progress_bar,
)
from crl_sdk.cli._options import command
from crl_sdk.cli._picture_check import CheckOption, CheckTexts, PictureCheck, read_check
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._background import BACKGROUND_FILE
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import PRECISIONS, RECOMMENDED_PROMPT, Manifest, Parity, Precision

BackgroundOption = Annotated[
    Path | None,
    typer.Option(
        "--background",
        help="Your own generic texts for a specialised model: a UTF-8 file with one text per line, "
        "50 or more. Default: 832 English words and captions.",
    ),
]


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="open_clip architecture, hf:OWNER/REPO, or a directory of either library."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new bundle.")],
    texts: CheckTexts = None,
    check: CheckOption = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="The weights: an open_clip tag, a .safetensors or .pt file, or `none` for random "
            "ones. A directory or repository has its own."
        ),
    ] = None,
    text_model: Annotated[
        str | None,
        typer.Option(
            "--text-model",
            help="The text tower of another model: hf:OWNER/REPO, or a directory. Its embeddings "
            "must be in the same space, such as those of a multilingual text tower.",
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per text, if the files of the model do not say it."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"Precisions, separated by commas: {', '.join(PRECISIONS)}.")
    ] = "fp32",
    name: Annotated[str | None, typer.Option(help="Name of the model in the manifest.")] = None,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence of the weights. Default: that of the model card, or unknown."
        ),
    ] = None,
    text: Annotated[bool, typer.Option(help="Export the text tower too.")] = True,
    background: BackgroundOption = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="Prompt that the bundle recommends for the texts of its bases, with one {} for "
            "the text. `{}` leaves them as they are."
        ),
    ] = RECOMMENDED_PROMPT,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model of open_clip or transformers to a bundle.

    The graphs are compared with torch. Nothing is written if one differs by more than its
    tolerance.
    """
    try:
        from crl_export.exporter import export_model
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "export", "crl export") from error

    picture_check = read_check(check, texts, f"crl export {model}")
    if check is not None and not text:
        raise InvalidInputError("--check needs the text tower: leave out --no-text, or --check")
    with progress_bar() as progress, plain_warnings():
        task = progress.add_task("starting", total=None)
        bundle = export_model(
            model,
            pretrained=pretrained,
            text_model=text_model,
            context_length=context_length,
            out=out_dir,
            precisions=parse_precisions(precision),
            name=name,
            license=license_name,
            text=text,
            background=background_texts(background),
            prompt=prompt,
            overwrite=overwrite,
            progress=lambda stage, done, total: progress.update(
                task, description=stage, completed=done, total=total
            ),
        )
    note(f"wrote {out_dir}")
    print_bundle(bundle, as_json, check=picture_check)


def add_background(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle.")],
    background: BackgroundOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add background texts to a bundle that an older version exported, or replace them.

    The method `contrastive` compares the texts of a criterion with these generic texts. Bases that
    exist already do not change; make them again to use the new background.
    """
    from crl_export.background import add_background

    changed = add_background(bundle, background_texts(background))
    note(f"wrote {bundle / BACKGROUND_FILE}")
    print_bundle(changed, as_json)


def info(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle.")],
    as_json: JsonOption = False,
) -> None:
    """Verify a bundle and print its contents."""
    print_bundle(ModelBundle.open(bundle), as_json)


def background_texts(path: Path | None) -> list[str] | None:
    """Read generic texts; lines that begin with `#` are comments."""
    if path is None:
        return None
    return [text for text in read_texts(path) if not text.startswith("#")]


def parse_precisions(value: str) -> tuple[Precision, ...]:
    """Return the precisions of a list that is separated by commas."""
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    unknown = sorted(set(names) - set(PRECISIONS))
    if unknown or not names:
        raise InvalidInputError(
            f"--precision: expected a comma-separated list of {', '.join(PRECISIONS)}, "
            f"got {value!r}"
        )
    return cast(tuple[Precision, ...], names)


def print_bundle(bundle: ModelBundle, as_json: bool, *, check: PictureCheck | None = None) -> None:
    """Print the contents of a bundle, and how similar a picture is to texts."""
    manifest = bundle.manifest
    similarities = None if check is None else check.compare(bundle)
    if as_json:
        import msgspec

        document = {"path": str(bundle.path), **msgspec.to_builtins(manifest)}
        print_json(document if similarities is None else {**document, "check": similarities})
        return
    facts = _facts(manifest)
    if manifest.text is not None:
        known = bundle.background
        facts["background"] = (
            f"none: add one with {command('background', str(bundle.path))}"
            if known is None
            else f"{len(known)} generic texts"
        )
    print_facts(str(bundle.path), facts)
    table = Table("graph", "MB", "cosine mean", "cosine min", "max |Δ|", "samples")
    for graph in manifest.images:
        table.add_row(graph.file, *_graph_row(manifest, graph.file, graph.parity))
    if manifest.text is not None:
        text = manifest.text
        table.add_row(text.file, *_graph_row(manifest, text.file, text.parity))
    out.print(table)
    if check is not None and similarities is not None:
        check.print(similarities)


def _facts(manifest: Manifest) -> dict[str, object]:
    spec = manifest.preprocess
    cropped = f", the centre of {spec.resize[0]}×{spec.resize[1]}" if spec.resize else ""
    facts: dict[str, object] = {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "source": f"{manifest.source.architecture} / {manifest.source.pretrained}",
        "licence": manifest.source.license,
        **({"activations": _activations(manifest)} if manifest.origin is None else {}),
        "embedding": f"{manifest.embedding_dim} × float32",
        "images": f"{spec.height}×{spec.width}{cropped}, {spec.resize_mode}, {spec.interpolation}",
        "made by": ", ".join(f"{tool} {version}" for tool, version in manifest.made_by.items()),
    }
    if manifest.origin is not None:
        origin = manifest.origin
        facts["imported"] = (
            f"{origin.layout}; images {_batching(origin.image_batch)}"
            + (f", texts {_batching(origin.text_batch)}" if origin.text_batch else "")
            + "; parity is measured against the imported graphs, not against torch"
        )
    if manifest.text is not None:
        facts["texts"] = f"up to {manifest.text.context_length} tokens"
        facts["prompt"] = manifest.text.prompt
    else:
        facts["texts"] = "none: image-only bundle"
    return facts


def _activations(manifest: Manifest) -> str:
    if manifest.source.quick_gelu:
        return "QuickGELU, as of OpenAI's models"
    return "the architecture's own, without QuickGELU"


def _batching(how: str) -> str:
    return "in batches" if how == "dynamic" else how


def _graph_row(manifest: Manifest, file: str, parity: Parity) -> list[str]:
    size = sum(
        entry.bytes
        for name, entry in manifest.files.items()
        if name == file or (name.startswith(f"{file}.") and name.endswith(".data"))
    )
    return [
        f"{size / 1e6:.1f}",
        f"{parity.cosine_mean:.7f}",
        f"{parity.cosine_min:.7f}",
        f"{parity.max_abs:.1e}",
        str(parity.samples),
    ]
