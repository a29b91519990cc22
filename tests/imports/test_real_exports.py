"""Exports of the real tools, imported, against the embeddings of the libraries themselves."""

from __future__ import annotations

import json
import random
import shutil
import warnings

import numpy as np
import pytest

pytest.importorskip("optimum.exporters.onnx", reason="run `make test-import`")
pytestmark = pytest.mark.filterwarnings("ignore")

import torch  # noqa: E402
from PIL import Image  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import real_layouts as real

from crl_export.imported.importer import Given, import_model  # noqa: E402
from crl_sdk import Embedder  # noqa: E402
from crl_sdk.errors import ExportError  # noqa: E402
from crl_sdk.model._tokenizer import Tokenizer  # noqa: E402

TEXTS = ["a photo of a cat", "red circle", "the small dog", "It is a LARGE blue square on red"]
TOLERANCE = 2e-6


def pictures() -> list[Image.Image]:
    """Photographs of several sizes, none of which is cropped by half a pixel."""
    rng = np.random.default_rng(0)
    made = []
    for width, height in ((64, 48), (40, 60), (32, 32), (90, 90), (100, 32)):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        made.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return made


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(bundle) -> tuple[np.ndarray, np.ndarray]:
    with Embedder.open(bundle) as embedder:
        return embedder.embed(pictures()).universal, embedder.embed_text(TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def clip(folder):
    return real.hugging_face_clip(folder / "clip")


@pytest.fixture(scope="module")
def towers(folder, clip):
    real.transformers_js(folder / "clip", folder / "xenova")
    return folder / "xenova"


@pytest.fixture(scope="module")
def open_clip_model():
    return real.open_clip_model()


def hugging_face(model, checkpoint, length) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of transformers itself, with its own processor and tokenizer."""
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pixels = processor(images=pictures(), return_tensors="pt")
    tokens = tokenizer(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        if "attention_mask" in tokens and model.config.model_type == "siglip":
            del tokens["attention_mask"]
        tokens.pop("token_type_ids", None)
        return (
            unit(model.get_image_features(**pixels)),
            unit(model.get_text_features(**tokens)),
        )


def assert_close(found, expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < TOLERANCE
        assert np.abs(theirs - theirs.mean(axis=0)).max() > 1e-2  # the embeddings differ at all


def test_transformers_js_clip_gives_the_embeddings_of_transformers(towers, clip, folder):
    bundle = import_model(towers, out=folder / "b-xenova", precisions=("fp32", "fp16", "int8"))
    assert bundle.manifest.origin.layout == "transformers.js"
    assert bundle.manifest.origin.image_batch == bundle.manifest.origin.text_batch == "dynamic"
    assert bundle.precisions == ("fp32", "fp16", "int8")
    with Embedder.open(bundle, engine="onnx/cpu/fp32") as embedder:
        found = embedder.embed(pictures()).universal, embedder.embed_text(TEXTS)
    assert_close(found, hugging_face(clip, folder / "clip", 77))


def test_a_quantised_file_becomes_an_int8_bundle(towers, clip, folder):
    bundle = import_model(towers, out=folder / "b-quantised", variant="quantized")
    assert bundle.precisions == ("int8",)
    images, _ = embeddings(bundle)
    expected, _ = hugging_face(clip, folder / "clip", 77)
    assert (images * expected).sum(axis=1).min() > 0.97


def test_siglip_gives_the_embeddings_of_transformers(folder):
    model = real.siglip(folder / "siglip", folder / "xenova-siglip")
    bundle = import_model(folder / "xenova-siglip", out=folder / "b-siglip")
    assert bundle.preprocess.resize_mode == "squash"
    assert bundle.manifest.text.context_length == 16
    assert_close(embeddings(bundle), hugging_face(model, folder / "siglip", 16))


@pytest.mark.parametrize(
    "sizes",
    [{"size": {"shortest_edge": 40}}, {"size": {"height": 42, "width": 36}, "resample": 2}],
    ids=["shortest", "squash"],
)
def test_a_crop_smaller_than_the_scaled_image_gives_the_embeddings_of_transformers(
    towers, clip, folder, sizes
):
    name = "-".join(["cropped", *sizes["size"]])
    source = shutil.copytree(towers, folder / name)
    written = folder / "clip" / "preprocessor_config.json"
    config = json.dumps({**json.loads(written.read_text()), **sizes})
    (source / "preprocessor_config.json").write_text(config)
    bundle = import_model(source, out=folder / f"b-{name}")
    assert bundle.preprocess.resize in ((40, 40), (42, 36)) and bundle.manifest.schema == 2
    checkpoint = shutil.copytree(folder / "clip", folder / f"clip-{name}")
    (checkpoint / "preprocessor_config.json").write_text(config)
    assert_close(embeddings(bundle), hugging_face(clip, checkpoint, 77))
    plain = hugging_face(clip, folder / "clip", 77)[0]
    assert np.abs(embeddings(bundle)[0] - plain).max() > 1e-3  # the crop changes them


def test_one_graph_of_optimum_is_cut_into_towers(clip, folder):
    real.optimum(folder / "clip", folder / "optimum")
    bundle = import_model(folder / "optimum", out=folder / "b-optimum")
    assert_close(embeddings(bundle), hugging_face(clip, folder / "clip", 77))


def test_fastembed_gives_the_same_embeddings(towers, folder):
    import fastembed

    vision, text = folder / "fe-vision", folder / "fe-text"
    real.fastembed(towers, vision, text)
    bundle = import_model(vision, out=folder / "b-fastembed", text_source=text)
    files = []
    for at, picture in enumerate(pictures()):
        files.append(folder / f"{at}.png")
        picture.save(files[-1])
    images = fastembed.ImageEmbedding(
        "Qdrant/clip-ViT-B-32-vision", specific_model_path=str(vision)
    ).embed(files)
    texts = fastembed.TextEmbedding(
        "Qdrant/clip-ViT-B-32-text", specific_model_path=str(text)
    ).embed(TEXTS)
    assert_close(embeddings(bundle), (unit(list(images)), unit(list(texts))))


def open_clip_embeddings(model) -> tuple[np.ndarray, np.ndarray]:
    import open_clip

    transform = open_clip.image_transform(
        real.SIZE, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(each) for each in pictures()]))
        return unit(images), unit(model.encode_text(tokenizer(TEXTS)))


def test_immich_gives_the_embeddings_of_open_clip(open_clip_model, folder):
    real.immich(open_clip_model, folder / "immich")
    bundle = import_model(folder / "immich", out=folder / "b-immich")
    assert bundle.manifest.origin.layout == "immich"
    assert bundle.manifest.origin.image_batch == "dynamic"  # traced with one image, and rewritten
    assert_close(embeddings(bundle), open_clip_embeddings(open_clip_model))


def test_clip_as_service_needs_a_tokenizer_and_gives_the_embeddings_of_open_clip(
    open_clip_model, folder
):
    real.clip_as_service(open_clip_model, folder / "cas")
    with pytest.raises(ExportError, match="--tokenizer FILE"):
        import_model(folder / "cas", out=folder / "b-cas")
    real.clip_tokenizer().save_pretrained(folder / "tokenizer")
    bundle = import_model(
        folder / "cas", out=folder / "b-cas", given=Given(tokenizer=folder / "tokenizer")
    )
    assert_close(embeddings(bundle), open_clip_embeddings(open_clip_model))


def test_a_tower_without_projection_is_refused(clip, folder):
    real.without_projection(folder / "clip", folder / "hidden")
    with pytest.raises(ExportError, match=r"without CLIP's projection.*CLIPVisionModelWithProj"):
        import_model(folder / "hidden", out=folder / "b-hidden")
    assert not (folder / "b-hidden").exists()


def test_ids_of_texts_equal_those_of_transformers(towers, folder):
    """Thousands of strings: words, punctuation, capitals, accents, emoji, HTML."""
    from transformers import AutoTokenizer

    bundle = import_model(towers, out=folder / "b-ids")
    theirs = AutoTokenizer.from_pretrained(folder / "clip")
    rng = random.Random(0)
    letters = "abcdefgh ABCDEF 0123 .,;:!?'\"-_&<>#@ éüñß 日本語 😀🎈 \t"
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(3000)]
    texts = [text for text in texts if text.strip()] + ["&amp; it's", "<b>", "don't", "ﬁne"]
    ours: Tokenizer = bundle.tokenizer()
    expected = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    assert np.array_equal(ours.encode(texts, truncate=True), np.array(expected))


def test_the_manifest_says_where_the_bundle_is_from(towers, folder):
    bundle = import_model(towers, out=folder / "b-origin", license="MIT")
    written = json.loads((bundle.path / "manifest.json").read_text())
    assert written["origin"]["layout"] == "transformers.js"
    assert set(written["origin"]["files"]) == {
        "image vision_model.onnx", "text text_model.onnx", "tokenizer.json",
    }  # fmt: skip
    assert written["source"]["license"] == "MIT"
