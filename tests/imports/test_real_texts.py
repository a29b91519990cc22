"""Text towers of BERT, XLM-R and CLIP: traced with one text, or with masks and types of tokens."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest

pytest.importorskip("optimum.exporters.onnx", reason="run `make test-import`")
pytestmark = pytest.mark.filterwarnings("ignore")

import torch  # noqa: E402
from optimum.exporters.onnx import main_export  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import real_layouts as real

from crl_export.imported.importer import import_model  # noqa: E402
from crl_sdk import Embedder  # noqa: E402

TEXTS = ["a photo of a cat", "red circle", "the small dog", "it is a large blue square on red"]
LENGTH, TOLERANCE = 40, 2e-6
_LAYERS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 19, "max_position_embeddings": LENGTH + 2,
}  # fmt: skip


def word_tokenizer(begin: str, fill: str, end: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, and the special tokens of a model."""
    vocabulary = {token: at for at, token in enumerate((begin, fill, "<unk>", end, *real.WORDS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 0), (end, 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", pad_token=fill, eos_token=end,
        model_max_length=LENGTH,
    )  # fmt: skip


class MultilingualCLIP(torch.nn.Module):
    """M-CLIP: the mean of the tokens of XLM-R, and a projection."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = XLMRobertaConfig(**_LAYERS, pad_token_id=1, attn_implementation=attention)
        self.transformer = XLMRobertaModel(config)
        self.projection = torch.nn.Linear(32, real.DIM)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.transformer(ids, attention_mask=mask)[0]
        kept = mask.float()
        mean = (tokens * kept.unsqueeze(2)).sum(dim=1) / kept.sum(dim=1)[:, None]
        return self.projection(mean)


class FirstToken(torch.nn.Module):
    """A text tower made from BERT: its first token, and a projection."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.transformer = BertModel(BertConfig(**_LAYERS, attn_implementation=attention))
        self.projection = torch.nn.Linear(32, real.DIM)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.projection(self.transformer(ids, attention_mask=mask)[0][:, 0])


class Clip(torch.nn.Module):
    """The text tower of CLIP in transformers, whose end of text is looked for."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = CLIPTextConfig(
            **{**_LAYERS, "max_position_embeddings": LENGTH}, eos_token_id=3, bos_token_id=0,
            pad_token_id=1, projection_dim=real.DIM, attn_implementation=attention,
        )  # fmt: skip
        self.tower = CLIPTextModelWithProjection(config)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.tower(ids).text_embeds


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def image_tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "immich"
    real.immich(real.open_clip_model(), folder)
    return folder


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [MultilingualCLIP, FirstToken, Clip])
def test_a_tower_traced_with_one_text_runs_in_batches(tmp_path, image_tower, kind, attention):
    """As immich exports M-CLIP: int32, a batch of one."""
    torch.manual_seed(0)
    model = kind(attention).eval()
    with torch.no_grad():  # else a random model gives all texts nearly the same embedding
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    source = tmp_path / "immich"
    shutil.copytree(image_tower, source)
    shutil.rmtree(source / "textual")
    tokenizer = word_tokenizer("<s>", "<pad>", "</s>")
    tokenizer.save_pretrained(source / "textual")
    (source / "config.json").write_text(json.dumps({"text_cfg": {"context_length": LENGTH}}))
    ids = torch.ones(1, LENGTH, dtype=torch.int32)
    ids[0, :3] = torch.tensor([0, 5, 3])
    with torch.no_grad():
        torch.onnx.export(
            model, (ids, (ids != 1).int()), str(source / "textual" / "model.onnx"),
            input_names=["input_ids", "attention_mask"], output_names=["embedding"],
            opset_version=17, dynamo=False,
        )  # fmt: skip
    bundle = import_model(source, out=tmp_path / "b")
    assert bundle.manifest.origin.text_batch == "dynamic"
    tokens = tokenizer(
        TEXTS, padding="max_length", max_length=LENGTH, return_tensors="pt", truncation=True
    )
    with torch.inference_mode():
        expected = unit(model(tokens["input_ids"], tokens["attention_mask"]))
    with Embedder.open(bundle) as embedder:
        found = embedder.embed_text(TEXTS)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-2


def test_chinese_clip_of_optimum(tmp_path):
    """One graph with both towers, whose text tower is BERT with masks and types of tokens."""
    torch.manual_seed(1)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": real.SIZE, "patch_size": 8,
    }  # fmt: skip
    model = ChineseCLIPModel(
        ChineseCLIPConfig(
            text_config={**_LAYERS, "pad_token_id": 1},
            vision_config=vision,
            projection_dim=real.DIM,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer = word_tokenizer("[CLS]", "[PAD]", "[SEP]")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    processor = ChineseCLIPImageProcessor(
        size={"height": real.SIZE, "width": real.SIZE}, do_center_crop=False
    )
    processor.save_pretrained(tmp_path / "checkpoint")
    main_export(
        str(tmp_path / "checkpoint"), output=tmp_path / "optimum",
        task="zero-shot-image-classification",
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "optimum")  # optimum has made it one of BERT
    bundle = import_model(tmp_path / "optimum", out=tmp_path / "b")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, 3)
        for size in ((64, 48), (40, 60), (32, 32))
    ]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    length = bundle.manifest.text.context_length
    tokens = tokenizer(
        TEXTS, padding="max_length", max_length=length, return_tensors="pt", truncation=True
    )
    with torch.inference_mode():
        images = unit(model.get_image_features(pixel_values=pixels))
        words = model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        texts = unit(model.text_projection(words[0][:, 0]))
    with Embedder.open(bundle) as embedder:
        assert np.abs(embedder.embed(pictures).universal - images).max() < TOLERANCE
        assert np.abs(embedder.embed_text(TEXTS) - texts).max() < TOLERANCE
