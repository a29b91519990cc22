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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from crl_export.imported.reading import read_json
from crl_sdk.errors import ExportError

LayoutName: TypeAlias = Literal[
    "immich", "transformers.js", "optimum or fastembed", "clip-as-service", "image tower"
]

VARIANTS = ("fp32", "fp16", "int8", "uint8", "quantized")
"""Suffixes of the files of transformers.js; the files in fp32 have none."""


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


def find_layout(source: Path, *, text: Path | None = None, variant: str = "fp32") -> Layout:
    """Find the towers in a directory, or take a file as the image tower.

    Args:
        source: Directory of a foreign export, or an ONNX file.
        text: Directory or ONNX file of the text tower, if it is elsewhere.
        variant: Which of several files of a tower to take, see `VARIANTS`.

    Raises:
        ExportError: If there is nothing that can be imported. The message says what was expected.
    """
    if variant not in VARIANTS:
        raise ExportError(f"expected a variant among {', '.join(VARIANTS)}, got {variant!r}")
    if source.is_file():
        if source.suffix != ".onnx":
            raise ExportError(
                f"{source}: expected a directory or a file that ends in .onnx; unpack archives and "
                "pass the directory"
            )
        found = Layout(
            "image tower",
            source,
            None,
            source.parent / "preprocessor_config.json",
            None,
            config=read_json(source.parent / "config.json"),
        )
    elif source.is_dir():
        found = _find_in_directory(source, variant)
    else:
        raise ExportError(f"{source}: no such file or directory; check the path")
    return found if text is None else _with_text(found, text, variant)


def _find_in_directory(source: Path, variant: str) -> Layout:
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
    if (source / "visual.onnx").is_file():
        text = source / "textual.onnx"
        return Layout(
            "clip-as-service",
            source / "visual.onnx",
            text if text.is_file() else None,
            source / "preprocessor_config.json",
            source if text.is_file() else None,
            config=config,
            text_config=config,
        )
    preprocess = source / "preprocessor_config.json"
    if any(onnx.glob("vision_model*.onnx")):
        image = _variant(onnx, "vision_model", variant)
        has_text = any(onnx.glob("text_model*.onnx"))
        return Layout(
            "transformers.js",
            image,
            _variant(onnx, "text_model", variant) if has_text else None,
            preprocess,
            source if has_text else None,
            config=config,
            text_config=config,
        )
    if any(onnx.glob("model*.onnx")):
        model = _variant(onnx, "model", variant)
        has_text = (source / "tokenizer.json").is_file()
        return Layout(
            "optimum or fastembed",
            model,
            model if has_text else None,
            preprocess,
            source if has_text else None,
            config=config,
            text_config=config,
        )
    there = sorted(each.name for each in source.glob("*.onnx"))[:5]
    also = f"; it has {', '.join(there)}: pass the image tower itself as a file" if there else ""
    raise ExportError(
        f"{source}: expected visual/model.onnx (immich), onnx/vision_model.onnx (transformers.js), "
        f"model.onnx (optimum, fastembed) or visual.onnx (clip-as-service), found none{also}"
    )


def _with_text(found: Layout, text: Path, variant: str) -> Layout:
    """Return a layout with the text tower of another place."""
    if text.is_file():
        file, directory = text, text.parent
    elif text.is_dir():
        directory = text / "textual" if (text / "textual").is_dir() else text
        onnx = directory / "onnx" if (directory / "onnx").is_dir() else directory
        if (directory / "textual.onnx").is_file():
            file = directory / "textual.onnx"
        else:
            name = "text_model" if any(onnx.glob("text_model*.onnx")) else "model"
            file = _variant(onnx, name, variant)
    else:
        raise ExportError(f"{text}: no such file or directory; check --text")
    return Layout(
        found.name,
        found.image,
        file,
        found.preprocess,
        directory,
        config=found.config,
        text_config=read_json(directory / "config.json") or read_json(text / "config.json"),
    )


def _variant(directory: Path, name: str, variant: str) -> Path:
    wanted = directory / (f"{name}.onnx" if variant == "fp32" else f"{name}_{variant}.onnx")
    if wanted.is_file():
        return wanted
    there = [
        each
        for each in VARIANTS
        if (directory / (f"{name}.onnx" if each == "fp32" else f"{name}_{each}.onnx")).is_file()
    ]
    raise ExportError(
        f"{wanted}: no such file; "
        + (f"choose another with --variant {' or '.join(there)}" if there else "check the path")
    )
