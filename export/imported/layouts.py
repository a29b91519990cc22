"""Which files of a directory are the towers, by the layouts that known tools write.

Sources of the layouts:

- immich: `machine-learning/immich_ml/models/clip/{visual,textual}.py` and
  `machine-learning/export/immich_model_exporter/exporters/onnx/models/openclip.py` of
  github.com/immich-app/immich.
- transformers.js: `scripts/convert.py`, `scripts/quantize.py` (suffixes of the files) and
  `scripts/extra/{clip,siglip}.py` (names of the outputs) of github.com/xenova/transformers.js.
- optimum: `CLIPOnnxConfig` in github.com/huggingface/optimum-onnx: one `model.onnx`.
- fastembed: `fastembed/image/onnx_embedding.py` of github.com/qdrant/fastembed.
- clip-as-service: `server/clip_server/model/clip_onnx.py` of github.com/jina-ai/clip-as-service.
- jina-clip: `src/models/jina_clip/` of github.com/huggingface/transformers.js; v1 has the layout of
  transformers.js, v2 one graph as optimum writes it, with its weights in `model.onnx_data`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from crl_export.model_files import check_inside, read_json
from crl_sdk.errors import ExportError

LayoutName: TypeAlias = Literal[
    "immich", "transformers.js", "optimum or fastembed", "clip-as-service", "image tower"
]

VARIANTS = ("fp32", "fp16", "int8", "uint8", "quantized")
"""Suffixes of the files of transformers.js; the files in fp32 have none."""

_VISUAL, _TEXTUAL = "visual.onnx", "textual.onnx"
"""Names of the files of clip-as-service, or their ends: `ViT-B-32-visual.onnx`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a foreign export.

    Attributes:
        name: Name of the layout.
        image: ONNX file with the image tower.
        text: ONNX file with the text tower; None if there is none. It may be the same file.
        preprocess: JSON file with the preprocessing; it need not exist.
        text_directory: Directory with `tokenizer.json`; None without a text tower.
        config: Content of `config.json`.
        text_config: Content of the text tower's `config.json`.
    """

    name: LayoutName
    image: Path
    text: Path | None
    preprocess: Path
    text_directory: Path | None
    config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)


def find_layout(
    source: Path,
    *,
    text: Path | None = None,
    variant: str = "fp32",
    text_variant: str | None = None,
) -> Layout:
    """Find the towers in a directory, or take a file as the image tower.

    Args:
        source: Directory of a foreign export, or an ONNX file.
        text: Directory or ONNX file of the text tower, if it is elsewhere.
        variant: Which of several files of a tower to take, see `VARIANTS`.
        text_variant: The same for the text tower; None for `variant`.

    Raises:
        ExportError: If there is nothing that can be imported, or a file is a link that leads out of
            the directory. The message says what was expected.
    """
    for each in (variant, text_variant or variant):
        if each not in VARIANTS:
            raise ExportError(f"expected a variant among {', '.join(VARIANTS)}, got {each!r}")
    wanted = _Wanted(variant, text_variant or variant)
    try:
        found = _find(source, wanted)
        found = found if text is None else _with_text(found, text, wanted)
    except OSError as error:
        raise ExportError(
            f"{error.filename or source}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if variant != "fp32" and not wanted.used:
        raise ExportError(
            f"{found.image}: the layout {found.name!r} has one file for each tower, so that there "
            "is no variant to choose; leave out --variant"
        )
    return found


def _find(source: Path, wanted: _Wanted) -> Layout:
    if source.is_file():
        return _find_file(source)
    if source.is_dir():
        found = _find_in_directory(source, wanted)
        _check_links(source, found)
        return found
    if source.exists():
        raise ExportError(f"{source}: expected a directory or a file, got a device or a pipe")
    raise ExportError(f"{source}: no such file or directory; check the path")


@dataclass(slots=True)
class _Wanted:
    """The variants to take, and whether the layout has any.

    Attributes:
        image: Variant of the image tower.
        text: Variant of the text tower.
        used: Whether a file was chosen by its variant.
    """

    image: str
    text: str
    used: bool = False

    def file(self, directory: Path, name: str, kind: Literal["image", "text"]) -> Path:
        """Return the file of a tower in the variant that is wanted."""
        self.used = True
        variant = self.image if kind == "image" else self.text
        path = directory / _file_name(name, variant)
        if path.exists():
            return path
        there = [each for each in VARIANTS if (directory / _file_name(name, each)).is_file()]
        option = "--variant" if kind == "image" else "--text-variant"
        raise ExportError(
            f"{path}: no such file; "
            + (f"choose another with {option} {' or '.join(there)}" if there else "check the path")
        )


def _file_name(name: str, variant: str) -> str:
    return f"{name}.onnx" if variant == "fp32" else f"{name}_{variant}.onnx"


def _has_variant(directory: Path, name: str) -> bool:
    return any(directory.glob(f"{name}.onnx")) or any(directory.glob(f"{name}_*.onnx"))


def _find_file(source: Path) -> Layout:
    """Return the layout of an ONNX file: an image tower, or one of the pairs of clip-as-service."""
    if source.suffix != ".onnx":
        raise ExportError(
            f"{source}: expected a directory or a file that ends in .onnx; unpack archives and "
            "pass the directory"
        )
    folder = source.parent
    preprocess, config = folder / "preprocessor_config.json", read_json(folder / "config.json")
    if source.name.endswith(_VISUAL):
        text = folder / (source.name.removesuffix(_VISUAL) + _TEXTUAL)
        if text.is_file():
            return Layout(
                "clip-as-service", source, text, preprocess, folder, config=config,
                text_config=config,
            )  # fmt: skip
    return Layout("image tower", source, None, preprocess, None, config=config)


def _find_in_directory(source: Path, wanted: _Wanted) -> Layout:
    config = read_json(source / "config.json")
    onnx = source / "onnx" if (source / "onnx").is_dir() else source
    if (source / "visual" / "model.onnx").is_file():
        text = source / "textual" / "model.onnx"
        return Layout(
            "immich",
            source / "visual" / "model.onnx",
            text if text.is_file() else None,
            source / "visual" / "preprocess_cfg.json",
            text.parent if text.is_file() else None,
            config=config,
            text_config=config,
        )
    if (source / _VISUAL).is_file():
        text = source / _TEXTUAL
        return Layout(
            "clip-as-service",
            source / _VISUAL,
            text if text.is_file() else None,
            source / "preprocessor_config.json",
            source if text.is_file() else None,
            config=config,
            text_config=config,
        )
    preprocess = source / "preprocessor_config.json"
    if _has_variant(onnx, "vision_model"):
        has_text = _has_variant(onnx, "text_model")
        return Layout(
            "transformers.js",
            wanted.file(onnx, "vision_model", "image"),
            wanted.file(onnx, "text_model", "text") if has_text else None,
            preprocess,
            source if has_text else None,
            config=config,
            text_config=config,
        )
    if _has_variant(onnx, "model"):
        has_text = (source / "tokenizer.json").is_file()
        return Layout(
            "optimum or fastembed",
            wanted.file(onnx, "model", "image"),
            wanted.file(onnx, "model", "text") if has_text else None,
            preprocess,
            source if has_text else None,
            config=config,
            text_config=config,
        )
    raise ExportError(
        f"{source}: expected visual/model.onnx (immich), onnx/vision_model.onnx (transformers.js), "
        "model.onnx (optimum, fastembed) or visual.onnx (clip-as-service), found none"
        f"{_what_is_there(source)}"
    )


def _what_is_there(source: Path) -> str:
    """Return what a directory without a known layout has instead, for the error message."""
    if snapshots := sorted(source.glob("snapshots/*/"))[:1]:
        return f": it is the cache of a repository, pass {snapshots[0]}"
    if there := sorted(each.name for each in islice(source.glob("*.onnx"), 5)):
        return f"; it has {', '.join(there)}: pass the image tower itself as a file"
    if there := sorted(each.name for each in islice(source.glob("*.safetensors"), 5)):
        return (
            f"; it has {', '.join(there)}, a checkpoint and no ONNX export: `crl export --help` "
            "says which checkpoints can be exported"
        )
    return ""


def _check_links(source: Path, found: Layout) -> None:
    """Check that no file of a directory is a link that leads out of it."""
    folders = {source, found.preprocess.parent, found.text_directory or source}
    names = (
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    )  # fmt: skip
    files = [folder / name for folder in folders for name in names]
    for file in (found.image, found.text, found.preprocess, *files):
        if file is not None and file.exists():
            check_inside(file, source)


def _with_text(found: Layout, text: Path, wanted: _Wanted) -> Layout:
    """Return a layout with the text tower of another place."""
    if text.is_file():
        file, directory = text, text.parent
    elif text.is_dir():
        directory = text / "textual" if (text / "textual").is_dir() else text
        onnx = directory / "onnx" if (directory / "onnx").is_dir() else directory
        if (directory / _TEXTUAL).is_file():
            file = directory / _TEXTUAL
        elif directory.name == "textual" and (directory / "model.onnx").is_file():
            file = directory / "model.onnx"  # immich has no variants
        else:
            name = "text_model" if _has_variant(onnx, "text_model") else "model"
            file = wanted.file(onnx, name, "text")
    else:
        raise ExportError(f"{text}: no such file or directory; check --text-model")
    layout = replace(
        found,
        text=file,
        text_directory=directory,
        text_config=read_json(directory / "config.json") or read_json(text / "config.json"),
    )
    if text.is_dir():
        for each in (file, directory / "tokenizer.json", directory / "tokenizer_config.json"):
            if each.exists():
                check_inside(each, text)
    return layout
