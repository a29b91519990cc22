"""`crl export --text-model`: text towers of other repositories equal their own code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import tiny_text_towers as towers  # noqa: E402
from tiny_text_towers import TEXTS, write_json, write_modules  # noqa: E402

import tiny_hugging_face as tiny  # noqa: E402
from crl_export.exporter import export_model  # noqa: E402
from crl_export.loading import load_checkpoint  # noqa: E402
from crl_sdk import Embedder  # noqa: E402
from crl_sdk.errors import ExportError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-6
"""Largest difference of an element of unit embeddings from those of the original code."""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A directory with the image tower, of as many dimensions as the text towers have."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    tiny.clip(folder)
    return str(folder)


def tokens_of(folder, texts):
    """Ids and mask of a tokenizer that pads to the longest text, as the original code does."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    fast.pad_token = config["pad_token"]
    found = fast(texts, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def mean_over_tokens(hidden, mask):
    """The mean over the tokens of each text, one text after the other."""
    return torch.stack(
        [rows[kept.bool()].mean(dim=0) for rows, kept in zip(hidden, mask, strict=True)]
    )


def unit(rows):
    rows = rows.detach().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def assert_texts_equal(bundle, expected) -> None:
    with Embedder.open(bundle, threads=1) as embedder:
        found = embedder.embed_text(TEXTS)
    assert np.abs(found - expected).max() < TOLERANCE
    differences = expected @ expected.T - np.eye(len(TEXTS))
    assert differences.max() < 0.999  # different texts have different embeddings


@pytest.mark.parametrize("base", ["xlm-roberta-large", "sentence-transformers/LaBSE"])
def test_m_clip_equals_its_own_code(base, image, tmp_path):
    model, linear = towers.m_clip(tmp_path / "text", base)
    bundle = export_model(image, text_model=str(tmp_path / "text"), out=tmp_path / "b")
    tokens = tokens_of(tmp_path / "text", TEXTS)
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
        expected = unit(linear(mean_over_tokens(hidden, tokens["attention_mask"])))
    assert_texts_equal(bundle, expected)
    assert bundle.manifest.text.context_length == towers.POSITIONS
    assert bundle.manifest.source.architecture.count("texts M-CLIP ") == 1
    assert bundle.manifest.source.pretrained == "directory clip, texts directory text"


@pytest.mark.parametrize("kind", towers.TRANSFORMERS)
def test_sentence_transformers_equal_their_own_code(kind, image, tmp_path):
    model, linear = towers.sentence_transformer(tmp_path / "text", kind)
    bundle = export_model(image, text_model=str(tmp_path / "text"), out=tmp_path / "b")
    tokens = tokens_of(tmp_path / "text", TEXTS)
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
        expected = unit(linear(mean_over_tokens(hidden, tokens["attention_mask"])))
    assert_texts_equal(bundle, expected)
    assert bundle.manifest.text.context_length == 32


def test_first_token_activation_and_normalisation(image, tmp_path):
    model, linear = towers.sentence_transformer(
        tmp_path / "text", pooling="cls_token", activation="torch.nn.modules.activation.Tanh",
        normalise=True, safetensors=False,
    )  # fmt: skip
    bundle = export_model(image, text_model=str(tmp_path / "text"), out=tmp_path / "b")
    with torch.inference_mode():
        hidden = model(**tokens_of(tmp_path / "text", TEXTS)).last_hidden_state
        expected = unit(torch.tanh(linear(hidden[:, 0])))
    assert_texts_equal(bundle, expected)


def test_a_new_configuration_of_pooling(image, tmp_path):
    folder = tmp_path / "text"
    towers.sentence_transformer(folder)
    old = export_model(image, text_model=str(folder), out=tmp_path / "old")
    write_json(folder / "1_Pooling/config.json", {"embedding_dimension": 1, "pooling_mode": "mean"})
    new = export_model(image, text_model=str(folder), out=tmp_path / "new")
    with Embedder.open(old) as first, Embedder.open(new) as second:
        assert np.array_equal(first.embed_text(TEXTS), second.embed_text(TEXTS))


@pytest.mark.parametrize("place", ["0_CLIPModel", ""])
def test_clip_of_sentence_transformers(place, tmp_path):
    folder = tmp_path / "clip"
    model = tiny.clip(folder / place)
    write_modules(folder, [(place, "CLIPModel")])
    bundle = export_model(str(folder), out=tmp_path / "b")
    assert bundle.manifest.name == "clip"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / place)
    tokens = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    with torch.inference_mode():
        rows = model.get_text_features(**tokens)
    expected = unit(rows if isinstance(rows, torch.Tensor) else rows.pooler_output)
    with Embedder.open(bundle) as embedder:
        assert np.abs(embedder.embed_text(TEXTS[:2]) - expected).max() < TOLERANCE


def test_image_tower_of_open_clip_and_text_tower_of_transformers(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    config = {"embed_dim": towers.DIM, "vision_cfg": vision, "text_cfg": text}
    write_json(
        tmp_path / "image" / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}}
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "image" / "open_clip_model.safetensors")
    tiny.clip(tmp_path / "text")
    preprocessing = tmp_path / "text" / "preprocessor_config.json"
    held = preprocessing.read_bytes()
    preprocessing.unlink()  # texts need none
    bundle = export_model(
        str(tmp_path / "image"), text_model=str(tmp_path / "text"), out=tmp_path / "b"
    )
    preprocessing.write_bytes(held)
    alone = export_model(str(tmp_path / "text"), out=tmp_path / "c")
    both = export_model(str(tmp_path / "image"), out=tmp_path / "d")
    assert bundle.manifest.fingerprint not in (
        alone.manifest.fingerprint, both.manifest.fingerprint,
    )  # fmt: skip
    with Embedder.open(bundle) as mixed, Embedder.open(alone) as words:
        assert np.array_equal(mixed.embed_text(TEXTS[:2]), words.embed_text(TEXTS[:2]))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with Embedder.open(bundle) as mixed, Embedder.open(both) as images:
        assert np.array_equal(
            mixed.embed(list(pixels)).universal, images.embed(list(pixels)).universal
        )


def test_a_criterion_in_other_languages(image, tmp_path):
    towers.m_clip(tmp_path / "text")
    bundle = export_model(image, text_model=str(tmp_path / "text"), out=tmp_path / "b")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with Embedder.open(bundle) as embedder:
        embedder.create_basis("farbe", ["rot", "grün", "blau"], prompts=["ein Foto: {}"])
        embedder.create_basis("yanse", ["红色", "绿色", "蓝色"], prompts=["{}"])
        result = embedder.embed([picture], criteria=["farbe", "yanse"])
    assert result["farbe"].shape[0] == 1 and np.isfinite(result["yanse"]).all()


def damaged_folders(folder):
    """Yield what is wrong with a directory of sentence-transformers, after changing it so."""
    modules = folder / "modules.json"
    good = modules.read_bytes()
    for content, message in (
        ("[", "expected a list of modules"),
        ('{"a": 1}', "expected a list of modules"),
        ('[{"type": "custom_st.Transformer", "path": ""}]', "code of the repository.*crl import"),
        ('[{"type": "sentence_transformers.models.BoW", "path": ""}]', "consists of BoW"),
        ('[{"type": "sentence_transformers.models.X", "path": "../x"}]', "outside the directory"),
    ):
        modules.write_text(content)
        yield message
    modules.write_bytes(good)
    for file, change, message in (
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "expected either the mean"),
        ("2_Dense/config.json", {"activation_function": "x.Softplus"}, "Dense layer with Softplus"),
        ("2_Dense/config.json", {"bias": False}, "linear.bias|superfluous"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("config.json", {"model_type": "t5"}, "of type 't5'"),
        ("config.json", {"n_layers": 3}, "missing, superfluous"),
        ("config.json", {"n_layers": 10**9}, "expected 1 to 1,000"),
    ):
        before = (folder / file).read_text()
        write_json(folder / file, {**json.loads(before), **change})
        yield message
        (folder / file).write_text(before)
    for file in ("2_Dense/model.safetensors", "model.safetensors"):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(before[: len(before) // 2])
        yield "tensors"
        (folder / file).unlink()
        yield "model.safetensors"
        (folder / file).write_bytes(before)


def test_damaged_directories_are_refused(tmp_path):
    towers.sentence_transformer(tmp_path / "text")
    seen = 0
    for message in damaged_folders(tmp_path / "text"):
        with pytest.raises(ExportError, match=message):
            load_checkpoint(str(tmp_path / "text"))
        seen += 1
    assert seen == 16
    assert load_checkpoint(str(tmp_path / "text")).text is not None


def test_damaged_directories_of_m_clip_are_refused(tmp_path):
    folder = tmp_path / "text"
    towers.m_clip(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"modelBase": "t5-base"}, "expected XLM-R, BERT or LaBSE"),
        ({"numDims": 512}, r"are \(512, 128\), the weights have \(16, 128\)"),
    ):
        write_json(folder / "config.json", {**config, **change})
        with pytest.raises(ExportError, match=message):
            load_checkpoint(str(folder))
    write_json(folder / "config.json", config)
    weights = torch.load(folder / "pytorch_model.bin")
    for name in ("LinearTransformation.weight", "transformer.encoder.layer.1.output.dense.bias",
                 "transformer.embeddings.word_embeddings.weight"):  # fmt: skip
        torch.save({k: v for k, v in weights.items() if k != name}, folder / "pytorch_model.bin")
        with pytest.raises(ExportError, match=name.split(".", 1)[1].replace(".", r"\.")):
            load_checkpoint(str(folder))
    torch.save({"x": print}, folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match="pickled code, which is never run"):
        load_checkpoint(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_tower(image, tmp_path):
    folder = tmp_path / "text"
    towers.m_clip(folder)
    weights = torch.load(folder / "pytorch_model.bin")
    name = "transformer.embeddings.word_embeddings.weight"
    torch.save({**weights, name: weights[name][:20].clone()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ExportError, match=r"embeddings of \d+ tokens, its tokenizer \d+ tokens: the"
    ):
        export_model(image, text_model=str(folder), out=tmp_path / "b")


def test_towers_of_other_models(image, tmp_path):
    towers.m_clip(tmp_path / "text")
    with pytest.raises(ExportError, match=r"has no image tower.*--text-model"):
        export_model(str(tmp_path / "text"), out=tmp_path / "b")
    with pytest.raises(ExportError, match="--text-model: nowhere is no directory"):
        export_model(image, text_model="nowhere", out=tmp_path / "b")
    linear = torch.nn.Linear(towers.WIDTH, 24)
    weights = torch.load(tmp_path / "text" / "pytorch_model.bin")
    weights |= {f"LinearTransformation.{name}": each for name, each in linear.state_dict().items()}
    torch.save(weights, tmp_path / "text" / "pytorch_model.bin")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    write_json(tmp_path / "text" / "config.json", {**config, "numDims": 24})
    with pytest.raises(ExportError, match=r"texts have 24 dimensions, those of images 16.*--text"):
        export_model(image, text_model=str(tmp_path / "text"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
