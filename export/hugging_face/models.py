"""Loads image and text towers with transformers, from a directory in the format of Hugging Face.

Weights are read as tensors only, and no code of a repository runs. A tower is used only if the
directory has all of its weights: transformers itself fills missing ones with random numbers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from crl_export.encoders import ImageEncoder, TextEncoder
from crl_export.messages import first_lines
from crl_export.model_files import read_json
from crl_sdk.errors import ExportError, MissingDependencyError

CONFIG_FILE = "config.json"

MAX_WIDTH = 1_000_000
"""Largest number in a configuration. The vocabulary of MetaCLIP 2 has 901,629 entries."""

_LIMITS = {"layers": 1_000, "heads": 1_000, "repeats": 20, "coefficient": 20, "image_size": 10_000}
"""Largest numbers under names with these words. The others are of ALIGN's EfficientNet."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the towers of a type of model are called.

    Attributes:
        model: Name of its class in transformers.
        image: Function from the model and normalised pixels, shape (b, 3, H, W), to the features
            of images, shape (b, d); None if it has no image tower.
        text: Function from the model, token ids and attention mask, both of shape (b, L) and int64,
            to the features of texts, shape (b, d); None if it has no text tower.
        padding: What keeps the padding of a text out of its embedding. `mask`: the text tower takes
            an attention mask. `end`: it reads no further than the end token. `none`: it was
            trained with texts that fill all of its positions, and reads the padding too.
        texts: Name of the part of the configuration that describes the text tower; empty if the
            configuration has no parts.
        unused_positions: Number of positions of the text tower that no token has.
        advice: What to do if weights are missing.
    """

    model: str
    image: Callable[[Any, torch.Tensor], torch.Tensor] | None
    text: Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor] | None
    padding: Literal["mask", "end", "none"] = "end"
    texts: str = "text_config"
    unused_positions: int = 0
    advice: str = "get the files again"


def _pooled(output: Any) -> torch.Tensor:
    """Return the features: transformers 4 returns them alone, 5 among other outputs."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _image(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return _pooled(model.get_image_features(pixel_values=pixels))


def _text(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return _pooled(model.get_text_features(input_ids=tokens, attention_mask=mask))


def _projected_image(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).image_embeds


def _projected_text(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return model(input_ids=tokens, attention_mask=mask).text_embeds


def _align_image(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean over the positions of the last feature map.

    ALIGN pools with a window that is larger than the map, and than what TensorRT takes.
    """
    if model.config.vision_config.pooling_type != "mean":
        return _image(model, pixels)
    return model.vision_model(pixel_values=pixels).last_hidden_state.mean(dim=(2, 3))


def _blip_2_image(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the embedding of the first query of BLIP-2.

    BLIP-2 has one embedding for each of its queries. Its authors take the first one where an image
    needs a single embedding (examples/blip2_feature_extraction.ipynb of
    github.com/salesforce/LAVIS).
    """
    patches = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(patches.shape[0], -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
    return model.vision_projection(seen[:, 0].to(model.vision_projection.weight.dtype))


def _blip_2_text(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    words = model.embeddings(input_ids=tokens)
    read = model.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
    return model.text_projection(read[:, 0])


def _first_token_text(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the features of Chinese-CLIP. `get_text_features` of transformers 4 fails."""
    read = model.text_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return model.text_projection(read[:, 0])


ARCHITECTURES = {
    "align": Architecture("AlignModel", _align_image, _text, "mask"),
    # as in RoBERTa, positions begin after the padding's
    "altclip": Architecture("AltCLIPModel", _image, _text, "mask", unused_positions=2),
    "blip-2": Architecture(
        "Blip2ForImageTextRetrieval",
        _blip_2_image,
        _blip_2_text,
        "mask",
        texts="qformer_config",
        advice="take a model of image-text matching, such as Salesforce/blip2-itm-vit-g",
    ),
    "chinese_clip": Architecture("ChineseCLIPModel", _image, _first_token_text, "mask"),
    "clip": Architecture("CLIPModel", _image, _text),
    "clip_text_model": Architecture("CLIPTextModelWithProjection", None, _projected_text, texts=""),
    "clip_vision_model": Architecture("CLIPVisionModelWithProjection", _projected_image, None),
    "metaclip_2": Architecture("MetaClip2Model", _image, _text),
    "siglip": Architecture("SiglipModel", _image, _text, "none"),
}
"""What can be exported, by `model_type` of `config.json`."""

_ELSEWHERE = {
    "siglip2": "it is a NaFlex model, which takes images of any size as patches; take a SigLIP 2 "
    "of fixed size, such as google/siglip2-base-patch16-224",
    "jina_clip": "it runs code of its repository; take its ONNX export: crl import DIR --out B",
}


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` and check its sizes.

    Raises:
        ExportError: If there is none, or a size is out of bounds.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ExportError(
            f"{directory}: has no {CONFIG_FILE}; expected a directory in the format of Hugging "
            "Face, with config.json, the weights, preprocessor_config.json and the tokenizer"
        )
    config = read_json(path)
    for key, value in _numbers(config):
        limit = next((most for name, most in _LIMITS.items() if name in key), MAX_WIDTH)
        sized = key.endswith(("_layers", "_heads", "_size", "_dim"))
        if value > limit or (sized and value < 1):
            raise ExportError(
                f"{path}: {key} is {value:,}, expected 1 to {limit:,}; get the file again"
            )
    return config


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a configuration with their names."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def architecture_of(directory: Path, config: dict[str, Any]) -> Architecture:
    """Return how the model of a directory is called.

    Raises:
        ExportError: If its type is not supported.
    """
    kind = str(config.get("model_type", ""))
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    reason = _ELSEWHERE.get(kind, "no code of a repository is run")
    raise ExportError(
        f"{directory}: models of type {kind or 'unknown'!r} cannot be exported ({reason}); "
        f"expected one of {', '.join(sorted(ARCHITECTURES))}"
    )


def load_model(directory: Path, architecture: Architecture) -> torch.nn.Module:
    """Load a model in float32 with all of its weights.

    Args:
        directory: Directory with `config.json` and the weights.
        architecture: Type of the model.

    Raises:
        ExportError: If weights are missing, of other shapes, or not readable as tensors.
        MissingDependencyError: If transformers is not installed.
    """
    transformers = import_transformers()
    kind = getattr(transformers, architecture.model, None)
    if kind is None:
        raise ExportError(
            f"transformers {transformers.__version__} has no {architecture.model}; upgrade it"
        )
    model, wrong = read_weights(directory, kind)
    if wrong:
        raise ExportError(
            f"{directory}: {len(wrong)} weights of {architecture.model} are missing or of another "
            f"shape, such as {wrong[0]}; config.json and the weights belong to different models: "
            f"{architecture.advice}"
        )
    assert isinstance(model, torch.nn.Module)
    return model.eval().requires_grad_(False)


def read_weights(directory: Path, kind: Any) -> tuple[Any, list[str]]:
    """Load a model of transformers in float32; no code of the directory is run.

    Args:
        directory: Directory with `config.json` and the weights.
        kind: Class of the model, or `AutoModel`.

    Returns:
        The model, and the sorted names of weights that the files lack or that have another shape.
        transformers makes random numbers for them.

    Raises:
        ExportError: If the files are not readable as tensors, or not of this class.
    """
    with quiet():
        try:
            model, loaded = kind.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are returned instead
            )
        except Exception as error:  # transformers, safetensors and torch raise many types
            raise ExportError(
                f"{directory}: transformers cannot load it as {kind.__name__} "
                f"({type(error).__name__}: {first_lines(error, 3)}); expected model.safetensors "
                "or pytorch_model.bin with tensors only: get the files again"
            ) from error
    wrong = [*loaded["mismatched_keys"], *loaded["missing_keys"]]
    return model, sorted(str(each[0] if isinstance(each, tuple) else each) for each in wrong)


def random_model(directory: Path, architecture: Architecture, seed: int) -> torch.nn.Module:
    """Return a model with random weights, of the sizes in `config.json`.

    Raises:
        ExportError: If the configuration is not one of this type.
    """
    transformers = import_transformers()
    with quiet():
        try:
            torch.manual_seed(seed)
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            model = getattr(transformers, architecture.model)(config)
        except Exception as error:  # transformers raises many types
            raise ExportError(
                f"{directory / CONFIG_FILE}: transformers cannot make a {architecture.model} of it "
                f"({type(error).__name__}: {first_lines(error, 3)})"
            ) from error
    assert isinstance(model, torch.nn.Module)
    return model.eval().requires_grad_(False)


class ImageTower(ImageEncoder):
    """The image tower of a model, with the method that open_clip's models have."""

    def __init__(self, model: torch.nn.Module, architecture: Architecture) -> None:
        """Wrap a model that has an image tower."""
        super().__init__()
        self.model, self.features = model, architecture.image

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Return the features of normalised images, shape (b, 3, H, W)."""
        assert self.features is not None
        features = self.features(self.model, image)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


class TextTower(TextEncoder):
    """The text tower of a model, with the method that open_clip's models have."""

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        pad_id: int,
        *,
        pad_ends_texts: bool = False,
    ) -> None:
        """Wrap a model that has a text tower.

        Args:
            model: The model.
            architecture: Its type.
            pad_id: Token id that fills the rest of a row.
            pad_ends_texts: Whether that token is also the last one of each text.
        """
        super().__init__()
        self.model, self.features = model, architecture.text
        self.masked = architecture.padding == "mask"
        self.pad_id, self.pad_ends_texts = pad_id, pad_ends_texts

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Return the features of texts.

        Args:
            text: Token ids, shape (b, L), int64.
            normalize: Whether to return unit rows.
        """
        assert self.features is not None
        mask = attention_mask(text, self.pad_id, self.pad_ends_texts) if self.masked else None
        features = self.features(self.model, text, mask)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


def attention_mask(tokens: torch.Tensor, pad_id: int, pad_ends_texts: bool = False) -> torch.Tensor:
    """Return 1 for the tokens of a text and 0 for the padding behind them.

    Args:
        tokens: Token ids, shape (b, L), int64.
        pad_id: Token id that fills rows. A text may contain it too.
        pad_ends_texts: Whether it is also the last token of each text.

    Returns:
        The mask, shape (b, L), int64.
    """
    others = (tokens != pad_id).to(torch.int64)
    mask = (others.flip(1).cumsum(1).flip(1) > 0).to(torch.int64)
    # shifted by one: the token after the last other one ends the text
    return torch.cat([mask[:, :1], mask[:, :-1]], dim=1) if pad_ends_texts else mask


def import_transformers() -> Any:
    """Import transformers.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "transformers", "transformers", "exporting a model of Hugging Face"
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages and progress bars of transformers. Failures are raised."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
