"""Loads text towers that were trained afterwards to give the embeddings of a CLIP model.

A transformer reads the tokens, its outputs are pooled, and dense layers make the embedding. Most of
them read many languages. Sources:

- M-CLIP: `multilingual_clip/pt_multilingual_clip.py` of github.com/FreddeFrallan/Multilingual-CLIP.
- sentence-transformers: `models/{Transformer,Pooling,Dense,Normalize,CLIPModel}.py` of
  github.com/UKPLab/sentence-transformers. `modules.json` lists what a model consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from crl_export.checkpoint import Checkpoint, TextPart, weights_sha256
from crl_export.encoders import TextEncoder
from crl_export.hugging_face.cache import is_cached, label_of, license_of, name_of
from crl_export.hugging_face.checkpoint import config_digest
from crl_export.hugging_face.models import (
    CONFIG_FILE,
    import_transformers,
    quiet,
    read_config,
    read_weights,
)
from crl_export.hugging_face.tokenizers import HuggingFaceTokenizer
from crl_export.model_files import MAX_JSON, read_json
from crl_sdk.errors import ExportError, IntegrityError
from crl_sdk.model._manifest import Source
from crl_sdk.storage._json import decode_json

MODULES_FILE = "modules.json"
M_CLIP = "M-CLIP"

_HEAD_WIDTH = 64
"""Width of an attention head in every BERT and XLM-R."""

_ENCODERS = {"bert": 0, "distilbert": 0, "mpnet": 2, "roberta": 2, "xlm-roberta": 2}
"""Types of transformers below the pooling, with the number of positions that no token has."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "Tanh": nn.Tanh,
}

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a text tower consists of.

    Attributes:
        transformer: Model from token ids and attention mask to `last_hidden_state`.
        pooling: Mean over the tokens of a text, or its first token.
        head: Layers from the pooled vector to the embedding.
        positions: Number of tokens that it reads.
        architecture: Kind and digest of the configuration, for the manifest.
    """

    transformer: nn.Module
    pooling: Pooling
    head: nn.Sequential
    positions: int | None
    architecture: str


class PooledTextTower(TextEncoder):
    """A transformer, pooling and dense layers, with the method that open_clip's models have."""

    def __init__(self, parts: _Parts, pad_id: int) -> None:
        """Put a tower together.

        Args:
            parts: What it consists of.
            pad_id: Token id that fills the rest of a row.
        """
        super().__init__()
        self.transformer, self.head = parts.transformer, parts.head
        self.pooling, self.pad_id = parts.pooling, pad_id

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Return the features of texts.

        Args:
            text: Token ids, shape (b, L), int64.
            normalize: Whether to return unit rows.
        """
        mask = (text != self.pad_id).to(torch.int64)
        hidden = self.transformer(input_ids=text, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(2).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        features: torch.Tensor = self.head(pooled)
        return nn.functional.normalize(features, dim=-1) if normalize else features


class _Unit(nn.Module):
    """Divides rows by their norm."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(rows, dim=-1)


def clip_folder(directory: Path) -> Path | None:
    """Return the folder with the whole CLIP model of a directory.

    Returns:
        The directory itself, or a folder of it if sentence-transformers wrote it. None if the
        directory holds a text tower of one of the kinds of this module.
    """
    if (directory / MODULES_FILE).is_file():
        modules = _read_modules(directory)
        return modules[0][1] if [kind for kind, _ in modules] == ["CLIPModel"] else None
    kind = read_json(directory / CONFIG_FILE).get("model_type")
    return None if kind == M_CLIP else directory


def load_text_tower(directory: Path, *, context_length: int | None = None) -> Checkpoint:
    """Load a text tower and its tokenizer. The checkpoint has no image tower.

    Args:
        directory: Directory of M-CLIP or sentence-transformers.
        context_length: Number of tokens per text, if the files do not say it.

    Raises:
        ExportError: If a file is missing or damaged, or the tower has parts that are not supported.
        MissingDependencyError: If transformers is not installed.
    """
    config = read_config(directory)
    if config.get("model_type") == M_CLIP:
        parts = _m_clip(directory, config)
    else:
        parts = _sentence_transformer(directory, config)
    tokenizer = HuggingFaceTokenizer(
        directory, positions=parts.positions, context_length=context_length
    )
    model = PooledTextTower(parts, tokenizer.pad_id).eval().requires_grad_(False)
    return Checkpoint(
        name=name_of(directory),
        image=None,
        text=TextPart(model, tokenizer),
        source=Source(
            architecture=parts.architecture,
            pretrained=label_of(directory),
            weights_sha256=weights_sha256(model),
            quick_gelu=False,
            license=license_of(directory) or "unknown",
        ),
        library="transformers",
    )


def _m_clip(directory: Path, config: dict[str, Any]) -> _Parts:
    """Return the parts of M-CLIP.

    The configuration names the repository of the transformer's own configuration. The sizes are
    taken from the shapes of the weights, so that nothing else is downloaded.
    """
    weights = _read_weights(directory)
    head = {name: tensor for name, tensor in weights.items() if "LinearTransformation." in name}
    prefix = "transformer."
    inner = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        # the pooler is not used, and older versions of transformers saved the positions
        if name.startswith(prefix) and ".pooler." not in name and "position_ids" not in name
    }
    transformer = _bare_transformer(directory, str(config.get("modelBase")), inner)
    _load(directory, transformer, inner)
    width = transformer.config.hidden_size
    linear = _linear(directory, head, "LinearTransformation.", bias=True)
    expected = (config.get("numDims"), config.get("transformerDimensions"))
    if (linear.out_features, linear.in_features) != expected or linear.in_features != width:
        raise ExportError(
            f"{directory / CONFIG_FILE}: numDims and transformerDimensions are {expected}, the "
            f"weights have {(linear.out_features, width)}; they belong to different models: get "
            "both files again"
        )
    unused = _ENCODERS[transformer.config.model_type]
    return _Parts(
        transformer=transformer,
        pooling="mean",
        head=nn.Sequential(linear),
        positions=transformer.config.max_position_embeddings - unused,
        architecture=f"{M_CLIP} {config_digest(config)}",
    )


def _bare_transformer(directory: Path, base: str, weights: dict[str, torch.Tensor]) -> Any:
    """Return a BERT or XLM-R of the sizes that weights have."""
    transformers = import_transformers()
    try:
        words = weights["embeddings.word_embeddings.weight"].shape
        sizes = {
            "vocab_size": words[0],
            "hidden_size": words[1],
            "num_attention_heads": words[1] // _HEAD_WIDTH,
            "num_hidden_layers": sum(n.endswith("attention.self.query.weight") for n in weights),
            "intermediate_size": weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": weights["embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": weights["embeddings.token_type_embeddings.weight"].shape[0],
        }
    except (KeyError, IndexError) as error:
        raise ExportError(
            f"{directory}: expected the weights of BERT or XLM-R below `transformer.`, found no "
            f"{error}; get the files again"
        ) from error
    family = base.rsplit("/", 1)[-1].lower()
    # what the shapes do not say is the same in all models of a family
    if family.startswith("xlm-roberta"):
        made = transformers.XLMRobertaModel, transformers.XLMRobertaConfig
        rest = {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    elif family.startswith("bert") or family == "labse":
        made = transformers.BertModel, transformers.BertConfig
        rest = {"layer_norm_eps": 1e-12, "pad_token_id": 0}
    else:
        made, rest = None, {}
    if made is None or words[1] % _HEAD_WIDTH:
        raise ExportError(
            f"{directory / CONFIG_FILE}: modelBase is {base!r} and the weights are {words[1]} "
            f"wide; expected XLM-R, BERT or LaBSE and a multiple of {_HEAD_WIDTH}"
        )
    model, config = made
    with quiet():
        return model(config(**sizes, **rest), add_pooling_layer=False)


def _sentence_transformer(directory: Path, config: dict[str, Any]) -> _Parts:
    modules = _read_modules(directory)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "Normalize"}:
        raise ExportError(
            f"{directory / MODULES_FILE}: consists of {', '.join(kinds)}; expected Transformer and "
            "Pooling, then Dense and Normalize if at all, or CLIPModel alone"
        )
    if modules[0][1] != directory:
        raise ExportError(
            f"{directory / MODULES_FILE}: its Transformer is in {modules[0][1].name}; expected it "
            "in the directory itself, as sentence-transformers writes it"
        )
    settings = read_json(directory / "sentence_bert_config.json")
    if settings.get("do_lower_case"):
        raise ExportError(
            f"{directory / 'sentence_bert_config.json'}: do_lower_case is true, which the exported "
            "tokenizer cannot do; expected a tokenizer that does it itself"
        )
    kind = str(config.get("model_type"))
    if kind not in _ENCODERS:
        raise ExportError(
            f"{directory / CONFIG_FILE}: its transformer is of type {kind!r}, expected one of "
            f"{', '.join(_ENCODERS)}"
        )
    transformer = _encoder(directory)
    head = [_layer(kind, folder) for kind, folder in modules[2:]]
    width = transformer.config.hidden_size
    for layer in head:
        if isinstance(layer[0], nn.Linear):
            if layer[0].in_features != width:
                raise ExportError(
                    f"{directory}: a Dense layer takes {layer[0].in_features} dimensions, those "
                    f"before it give {width}; the files belong to different models"
                )
            width = layer[0].out_features
    limits = [
        config.get("max_position_embeddings", 0) - _ENCODERS[kind],
        settings.get("max_seq_length"),
    ]
    known = [each for each in limits if isinstance(each, int) and each > 0]
    folders = {folder.name: read_json(folder / CONFIG_FILE) for _, folder in modules}
    return _Parts(
        transformer=transformer,
        pooling=_pooling(modules[1][1]),
        head=nn.Sequential(*head),
        positions=min(known) if known else None,
        architecture=f"sentence-transformers {config_digest({'modules': kinds, **folders})}",
    )


def _read_modules(directory: Path) -> list[tuple[str, Path]]:
    """Return the names of the classes in `modules.json`, with their folders."""
    path = directory / MODULES_FILE
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("it is too large")
        entries = decode_json(path.read_bytes())
        modules = [(str(each["type"]), str(each["path"])) for each in entries]
    except (OSError, ValueError, IntegrityError, TypeError, KeyError) as error:
        raise ExportError(
            f"{path}: expected a list of modules with type and path ({type(error).__name__}: "
            f"{error}); get the file again"
        ) from error
    found = []
    for kind, name in modules:
        if not kind.startswith("sentence_transformers."):
            cached = is_cached(directory)
            again = f"hf:{label_of(directory).split('@')[0]}" if cached else str(directory)
            raise ExportError(
                f"{path}: {kind} is code of the repository, which is never run; take an ONNX "
                f"export of the model: crl import {again} --out BUNDLE"
            )
        folder = directory / name
        if not folder.resolve().is_relative_to(directory.resolve()):
            raise ExportError(f"{path}: {name!r} is outside the directory; do not use this model")
        found.append((kind.rsplit(".", 1)[-1], folder))
    return found


def _encoder(directory: Path) -> Any:
    model, wrong = read_weights(directory, import_transformers().AutoModel)
    # the pooler is not used
    if used := [name for name in wrong if not name.startswith("pooler.")]:
        raise _missing(directory, used)
    return model


def _pooling(folder: Path) -> Pooling:
    config = read_json(folder / CONFIG_FILE)
    named: dict[str, Pooling] = {
        "mean": "mean",
        "cls": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
    }
    chosen = config.get("pooling_mode")
    modes = [chosen] if isinstance(chosen, str) else list(chosen or ())
    modes += [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in named:
        raise ExportError(
            f"{folder / CONFIG_FILE}: pools by {', '.join(map(str, modes)) or 'nothing'}; expected "
            "either the mean of the tokens or the first one (cls)"
        )
    return named[modes[0]]


def _layer(kind: str, folder: Path) -> nn.Sequential:
    if kind == "Normalize":
        return nn.Sequential(_Unit())
    config = read_json(folder / CONFIG_FILE)
    names = [config.get(key) for key in ("module_input_name", "module_output_name")]
    activation = str(config.get("activation_function") or "Identity").rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS or not {*names} <= {None, "sentence_embedding"}:
        raise ExportError(
            f"{folder / CONFIG_FILE}: a Dense layer with {activation} from {names[0]} to "
            f"{names[1]}; expected one of {', '.join(_ACTIVATIONS)} on the embedding of the text"
        )
    bias = config.get("bias", True) is True
    return nn.Sequential(
        _linear(folder, _read_weights(folder), "linear.", bias=bias), _ACTIVATIONS[activation]()
    )


def _linear(
    directory: Path, weights: dict[str, torch.Tensor], prefix: str, *, bias: bool
) -> nn.Linear:
    """Return the layer of a checkpoint whose weights begin with a prefix."""
    weight = weights.get(f"{prefix}weight")
    if weight is None or weight.ndim != 2:
        raise _missing(directory, [f"{prefix}weight"])
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    _load(directory, layer, {name.removeprefix(prefix): each for name, each in weights.items()})
    return layer


def _load(directory: Path, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put weights into a module; every one of them, and no others."""
    try:
        module.load_state_dict({name: each.float() for name, each in weights.items()})
    except RuntimeError as error:
        own = {name: each.shape for name, each in module.state_dict().items()}
        theirs = {name: each.shape for name, each in weights.items()}
        different = [n for n in {**own, **theirs} if own.get(n) != theirs.get(n)]
        raise _missing(directory, different) from error


def _missing(directory: Path, names: Sequence[str]) -> ExportError:
    return ExportError(
        f"{directory}: {len(names)} weights of the text tower are missing, superfluous or of "
        f"another shape, such as {min(names)}; the configuration and the weights belong to "
        "different models: get the files again"
    )


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read `model.safetensors` or `pytorch_model.bin`, of which only tensors are unpickled."""
    from safetensors.torch import load_file

    readers: dict[str, Callable[[Path], Any]] = {
        "model.safetensors": load_file,
        "pytorch_model.bin": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    }
    for name, read in readers.items():
        path = directory / name
        if not path.is_file():
            continue
        try:
            weights = read(path)
        except Exception as error:  # pickle, zipfile, torch and safetensors raise many types
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise ExportError(
                f"{path}: not a checkpoint of tensors only ({type(error).__name__}: {reason}); "
                "truncated, or pickled code, which is never run: get it again"
            ) from error
        if not isinstance(weights, dict) or not all(
            isinstance(each, torch.Tensor) for each in weights.values()
        ):
            raise ExportError(f"{path}: expected tensors with names; get the file again")
        return weights
    raise ExportError(f"{directory}: has neither {' nor '.join(readers)}; get the files again")
