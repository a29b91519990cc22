"""`crl import`: make a model bundle from somebody else's ONNX export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from crl_sdk.cli._console import (
    JsonOption,
    note,
    plain_warnings,
    progress_bar,
    warn,
)
from crl_sdk.cli._export import (
    BackgroundOption,
    background_texts,
    parse_precisions,
    print_bundle,
)
from crl_sdk.cli._picture_check import CheckOption, CheckTexts, read_check
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import PRECISIONS, RECOMMENDED_PROMPT


def import_bundle(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory of the export, hf:OWNER/REPO, or the ONNX file of an image tower."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new bundle.")],
    texts: CheckTexts = None,
    check: CheckOption = None,
    text_model: Annotated[
        str | None,
        typer.Option(
            "--text-model",
            help="Directory, hf:OWNER/REPO or ONNX file of the text tower, if it is elsewhere.",
        ),
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Import the image tower alone.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the model, or a directory with it.")
    ] = None,
    variant: Annotated[
        str,
        typer.Option(help="Which files to take: fp32, fp16, int8, uint8 or quantized."),
    ] = "fp32",
    text_variant: Annotated[
        str | None, typer.Option(help="Which file of the text tower to take. Default: --variant.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help=f"Precisions of the bundle, separated by commas: {', '.join(PRECISIONS)}. "
            "Default: that of the imported graph."
        ),
    ] = "",
    image_input: Annotated[str | None, typer.Option(help="Name of the input with pixels.")] = None,
    image_output: Annotated[
        str | None, typer.Option(help="Name of the output with embeddings of images.")
    ] = None,
    text_output: Annotated[
        str | None, typer.Option(help="Name of the output with embeddings of texts.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the input in pixels: 224, or HEIGHT,WIDTH.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="Size in pixels that images are scaled to before the centre is cropped to --size: "
            "256, or HEIGHT,WIDTH. Default: that of --size."
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of the channels in [0, 1], such as 0.5,0.5,0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of the channels.")] = None,
    interpolation: Annotated[
        Literal["bicubic", "bilinear"] | None, typer.Option(help="Resampling filter.")
    ] = None,
    resize_mode: Annotated[
        Literal["shortest", "longest", "squash"] | None,
        typer.Option(help="Scale the shorter side and crop, the longer side and pad, or both."),
    ] = None,
    context_length: Annotated[int | None, typer.Option(min=2, help="Tokens per text.")] = None,
    pad_id: Annotated[
        int | None, typer.Option(min=0, help="Id of the token that fills short texts.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the manifest.")] = None,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence of the weights. Default: that of the model card, or unknown."
        ),
    ] = None,
    background: BackgroundOption = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt that the bundle recommends for its bases, with one {}.")
    ] = RECOMMENDED_PROMPT,
    time_limit: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds that a graph of the export may take for the check inputs."
        ),
    ] = 600,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Import an ONNX export of a CLIP model as a bundle, without torch.

    Layouts: immich, transformers.js (Xenova), optimum, fastembed, clip-as-service, or the ONNX file
    of an image tower. The graphs are compared with those of the export. Nothing is written if one
    differs by more than its tolerance.
    """
    try:
        from crl_export.imported.importer import Given, import_model
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "onnx", "import", "crl import") from error

    picture_check = read_check(check, texts, "crl import DIR")
    if no_text and (text_model or check or background or tokenizer):
        raise InvalidInputError(
            "--no-text leaves the text tower out: leave out --text-model, --tokenizer, --check and "
            "--background, or --no-text"
        )
    given = Given(
        image_input=image_input,
        image_output=image_output,
        text_output=text_output,
        tokenizer=tokenizer,
        context_length=context_length,
        pad_id=pad_id,
        preprocess=_preprocess(size, resize, mean, std, interpolation, resize_mode),
    )
    with progress_bar() as progress, plain_warnings():
        task = progress.add_task("starting", total=None)
        bundle = import_model(
            source,
            out=out_dir,
            text_source=text_model,
            variant=variant,
            text_variant=text_variant,
            precisions=parse_precisions(precision) if precision else (),
            name=name,
            license=license_name,
            text=not no_text,
            background=background_texts(background),
            prompt=prompt,
            overwrite=overwrite,
            given=given,
            time_limit=time_limit,
            progress=lambda stage, done, total: progress.update(
                task, description=stage, completed=done, total=total
            ),
        )
    note(f"wrote {out_dir}")
    _note_limits(bundle)
    print_bundle(bundle, as_json, check=picture_check)


def _note_limits(bundle: ModelBundle) -> None:
    """Say what is slower than it could be, and what a bundle without a text tower cannot do."""
    origin = bundle.manifest.origin
    if origin is not None and origin.image_batch == "one by one":
        note(
            "the image graph takes one image at a time: a batch is not faster than its images, and "
            "TensorRT cannot compile it"
        )
    if bundle.manifest.text is None:
        warn(
            "no text tower: `crl embed` and `crl serve` give plain embeddings of images; `crl "
            "basis create`, and every command that makes a basis from words, need the text tower. "
            "Import again with --text-model DIR"
        )


def _preprocess(
    size: str | None,
    resize: str | None,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
    resize_mode: str | None,
) -> dict[str, Any]:
    """Return the fields of `PreprocessSpec` that the options give."""
    fields: dict[str, Any] = {}
    if size is not None:
        fields["height"], fields["width"] = _height_width("--size", size)
    if resize is not None:
        fields["resize"] = _height_width("--resize", resize)
    if mean is not None:
        fields["mean"] = _numbers("--mean", mean, (3,))
    if std is not None:
        fields["std"] = _numbers("--std", std, (3,))
        if min(fields["std"]) <= 0:
            raise InvalidInputError(f"--std: expected positive numbers, got {std!r}")
    if interpolation is not None:
        fields["interpolation"] = interpolation
    if resize_mode is not None:
        fields["resize_mode"] = resize_mode
    return fields


def _height_width(option: str, value: str) -> tuple[int, int]:
    sides = _numbers(option, value, (1, 2))
    if not all(side >= 1 and side.is_integer() for side in sides):
        raise InvalidInputError(f"{option}: expected whole pixels, such as 224, got {value!r}")
    return int(sides[0]), int(sides[-1])


def _numbers(option: str, value: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in value.split(","))
    except ValueError:
        found = ()
    if len(found) not in counts:
        raise InvalidInputError(
            f"{option}: expected {' or '.join(map(str, counts))} numbers separated by commas, got "
            f"{value!r}"
        )
    return found
