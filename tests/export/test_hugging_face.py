"""`crl export` of models in the format of Hugging Face equals transformers."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny_hugging_face as tiny
from crl_export.exporter import export_model
from crl_export.hugging_face.cache import license_of
from crl_export.hugging_face.checkpoint import load_directory
from crl_export.hugging_face.hub import wanted_files
from crl_export.hugging_face.models import ARCHITECTURES, ImageTower
from crl_export.loading import load_checkpoint
from crl_export.precision import quantise
from crl_export.tensorrt import compile_plan
from crl_export.vit import lean_tower
from crl_sdk import Client, Embedder
from crl_sdk.cli import app
from crl_sdk.errors import CrlError, ExportError
from crl_sdk.model import PreprocessSpec

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")

TEXTS = ["a photo of a cat", "red circle", "the small dog", "It is a LARGE blue square on red"]
TOLERANCE = 5e-6
SPEC = PreprocessSpec(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    made = []
    for width, height in ((64, 48), (40, 60), (32, 32), (90, 90), (100, 32)):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        made.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return made


def unit(rows) -> np.ndarray:
    rows = np.asarray(getattr(rows, "pooler_output", rows))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def of_transformers(model, folder, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of transformers itself, with its own processor and tokenizer."""
    processor = tiny.pillow(tiny.PROCESSORS[kind]).from_pretrained(folder)
    pixels = processor(images=pictures(), return_tensors="pt")["pixel_values"]
    filled = kind.startswith("siglip")  # they were trained so
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [text.lower() for text in TEXTS] if kind == "siglip_2" else TEXTS,
        padding="max_length" if filled else True,
        max_length=64,
        truncation=True,
        return_tensors="pt",
    )
    read = {"input_ids": tokens["input_ids"]}
    if not filled:
        read["attention_mask"] = tokens["attention_mask"]
    with torch.inference_mode():
        if kind == "chinese_clip":
            both = model(pixel_values=pixels, **read)
            return unit(both.image_embeds), unit(both.text_embeds)
        if kind != "blip_2":
            images = model.get_image_features(pixel_values=pixels)
            return unit(images), unit(model.get_text_features(**read))
        first = {name: rows[:1].expand(len(pixels), -1) for name, rows in read.items()}
        queries = model(pixel_values=pixels, **first).image_embeds
        repeated = pixels[:1].expand(len(TEXTS), -1, -1, -1)
        return unit(queries[:, 0]), unit(model(pixel_values=repeated, **read).text_embeds)


def assert_equal_embeddings(bundle, expected) -> None:
    with Embedder.open(bundle, threads=1) as embedder:
        found = embedder.embed(pictures()).universal, embedder.embed_text(TEXTS)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < TOLERANCE
        assert np.abs(theirs - theirs.mean(axis=0)).max() > 1e-2  # the embeddings differ at all


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "clip"
    return tiny.clip(folder), folder


def test_clip_equals_transformers(clip, tmp_path):
    model, folder = clip
    bundle = export_model(str(folder), out=tmp_path / "b")
    assert bundle.manifest.source.quick_gelu
    assert bundle.manifest.made_by["transformers"] == transformers.__version__
    assert_equal_embeddings(bundle, of_transformers(model, folder, "clip"))


@pytest.mark.parametrize("kind", sorted(set(tiny.PROCESSORS) - {"clip"}))
def test_an_architecture_from_the_export_to_the_service(kind, serve, tmp_path):
    folder = tmp_path / kind
    model = getattr(tiny, kind)(folder)
    bundle = export_model(str(folder), out=tmp_path / "b")
    assert bundle.manifest.text.clean == "none"
    assert bundle.manifest.text.context_length == tiny.CONTEXT_LENGTHS.get(kind, 77)
    assert bundle.manifest.preprocess.resize == ((346, 346) if kind == "align" else None)
    images, texts = of_transformers(model, folder, kind)
    assert_equal_embeddings(bundle, (images, texts))
    with Embedder.open(bundle, threads=1) as embedder, Client(serve(embedder).address) as client:
        client.create_basis("texts", TEXTS, prompts=["{}"], method="cosine")
        found = client.embed(pictures(), criteria=["texts"])
    assert np.abs(found.universal - images).max() < TOLERANCE
    assert np.abs(found["texts"] - unit(images @ texts.T)).max() < 10 * TOLERANCE
    plan = compile_plan(bundle, precision="fp32", architectures=["sm89"], directory=tmp_path)
    assert plan.plan.inputs[0].dtype == "uint8"


def test_a_picture_shows_at_once_whether_the_model_works(clip, tmp_path):
    pictures()[0].save(tmp_path / "a.png")
    words = [
        "export",
        str(clip[1]),
        "--out",
        str(tmp_path / "b"),
        "--check",
        str(tmp_path / "a.png"),
    ]
    printed = CliRunner().invoke(app, [*words, "red", "a cat", "--json"])
    assert printed.exit_code == 0, printed
    similarities = json.loads(printed.stdout)["check"]
    with Embedder.open(tmp_path / "b", threads=1) as embedder:
        images, texts = embedder.embed(pictures()[:1]), embedder.embed_text(["red", "a cat"])
    assert list(similarities) == ["red", "a cat"]
    assert list(similarities.values()) == pytest.approx((images.universal @ texts.T)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", __file__, "red"], "not a readable image"),
        (["red"], "belong together"),
        (["--check", "a.png", "red", "--no-text"], "leave out --no-text, or --check"),
    ],
)
def test_a_check_that_cannot_be_made_ends_before_the_export(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures()[0].save("a.png")
    ended = CliRunner().invoke(app, ["export", "none", "--out", "b", *words]).exception
    assert isinstance(ended, CrlError) and message in str(ended)


def test_the_end_token_of_older_configurations_of_clip(tmp_path):
    """Their `eos_token_id` is 2, which is not that of the tokenizer."""
    model = tiny.clip(tmp_path / "clip", end=2)
    part = load_directory(tmp_path / "clip").text
    ids = torch.from_numpy(part.tokenizer.ids(TEXTS))
    with torch.inference_mode():
        expected = unit(model.get_text_features(ids))
        assert np.abs(unit(part.model.encode_text(ids)) - expected).max() < TOLERANCE
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-2


def test_towers_of_different_directories(tmp_path):
    image, text = tiny.clip_towers(tmp_path)
    loaded = load_checkpoint(str(tmp_path / "image"), text_model=str(tmp_path / "text"))
    pixels = torch.randn(3, 3, tiny.SIZE, tiny.SIZE)
    ids = loaded.text.tokenizer.ids(TEXTS)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")(
        TEXTS, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        ours = loaded.image.model.encode_image(pixels)
        assert torch.equal(ours, image(pixel_values=pixels).image_embeds)
        ours = loaded.text.model.encode_text(torch.from_numpy(ids))
        assert (ours - text(**tokens).text_embeds).abs().max() < TOLERANCE
    for name, message in (("image", "has no text tower"), ("text", "has no image tower")):
        with pytest.raises(ExportError, match=message):
            export_model(str(tmp_path / name), out=tmp_path / "c")
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["siglip", pytest.param("blip_2", marks=pytest.mark.slow)])
def test_smaller_precisions(kind, tmp_path):
    """The bounds are those of every model: `crl_sdk.model._parity.TOLERANCES`."""
    getattr(tiny, kind)(tmp_path / kind)
    export_model(
        str(tmp_path / kind), out=tmp_path / "b", text=False, precisions=("fp16", "int8"),
        strict_int8=True,
    )  # fmt: skip


def test_convolutions_alone_have_no_int8(tmp_path):
    """As ALIGN's image tower, which ends with the mean of its last convolution."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 2, 2), np.float32), "w")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"
    ]
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match="leave int8 out of --precision"):
        quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", SPEC)


def test_activations_are_known_if_the_configuration_leaves_out_its_defaults(clip, tmp_path):
    """As transformers 4 writes it: QuickGELU is the default of CLIP."""
    lean = tmp_path / "lean"
    shutil.copytree(clip[1], lean)
    config = json.loads((lean / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        assert config[tower].pop("hidden_act") == "quick_gelu"
    (lean / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(str(lean), text=False).source.quick_gelu


def test_missing_weights_are_not_filled_with_random_ones(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = clip
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"1 weights of CLIPModel are .*visual_projection"):
        export_model(str(broken), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "norms from 0 to 0"), (np.nan, "norms from nan")]
)
def test_damaged_weights_are_refused(value, words, clip, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip[1], tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    weights = load_file(file)
    weights["visual_projection.weight"].fill_(value)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"zero or not finite .{words}"):
        export_model(str(tmp_path / "damaged"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def changed(clip, folder, file="config.json", **sections):
    """A copy of a directory in which sections of a JSON file have other values."""
    shutil.copytree(clip[1], folder)
    content = json.loads((folder / file).read_text())
    for name, value in sections.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"crop_size": {"height": 24, "width": 24}}, "24×24 pixels"),
        ({"image_std": [0.5, 0, 0.5]}, "expected numbers, and positive ones"),
        ({"image_mean": [float("nan"), 0, 0]}, "expected numbers, and positive ones"),
        (
            {"crop_size": {"height": 9000, "width": 9000}, "size": {"shortest_edge": 9000}},
            "9000×9000 pixels",
        ),
    ],
)
def test_the_preprocessing_of_another_model_is_refused(sections, message, clip, tmp_path):
    folder = changed(clip, tmp_path / "other", "preprocessor_config.json", **sections)
    with pytest.raises(ExportError, match=message):
        export_model(folder, out=tmp_path / "b")
    assert os.listdir(tmp_path) == ["other"]


def test_weights_of_another_size_are_named(clip, tmp_path):
    folder = changed(clip, tmp_path / "other", text_config={"vocab_size": 1000})
    with pytest.raises(ExportError, match=r"another shape, such as .*token_embedding\.weight"):
        export_model(folder, out=tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("siglip2", "NaFlex"), ("jina_clip", "crl import"), ("llama", "expected one of align")],
)
def test_other_types_are_refused(kind, message, clip, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ExportError, match=message):
        export_model(str(tmp_path), out=tmp_path / "b")


def test_the_weights_that_are_downloaded():
    clip = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
    assert wanted_files(clip) == ["README.md", "config.json", "model.safetensors"]
    assert wanted_files(["pytorch_model.bin"]) == ["pytorch_model.bin"]
    sharded = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert wanted_files([*sharded, "onnx/model.onnx"]) == sharded
    both = ["open_clip_config.json", "open_clip_pytorch_model.bin", "model.safetensors"]
    assert wanted_files(both) == ["open_clip_config.json", "open_clip_pytorch_model.bin"]
    folders = ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "1_Pooling/config.json"]
    assert wanted_files(folders) == ["1_Pooling/config.json", "2_Dense/model.safetensors"]


def test_the_licence_of_the_model_card(tmp_path):
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\nlicense: no\n")
    assert license_of(tmp_path) == "apache-2.0"


@pytest.mark.parametrize("kind", ["CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_rewritten_image_tower_gives_what_transformers_gives(kind, activation):
    text = {**tiny.TEXT, "vocab_size": 100, "max_position_embeddings": 20, "project_dim": 16}
    vision = {**tiny.VISION, "hidden_act": activation, "projection_dim": 16}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, projection_dim=16
    )
    model = tiny.randomise(getattr(transformers, f"{kind}Model")(config))
    with torch.no_grad():  # layers that are not the identity
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tower = ImageTower(model, ARCHITECTURES[str(config.model_type)])
    lean = lean_tower(tower)
    assert lean is not None
    pixels = torch.randn(5, 3, tiny.SIZE, tiny.SIZE)
    with torch.inference_mode():
        theirs, ours = tower.encode_image(pixels), lean(pixels.permute(0, 2, 3, 1))
    assert theirs.std(0).mean() > 1e-2
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_other_image_towers_are_not_rewritten():
    vision = {**tiny.VISION, "hidden_act": "relu"}
    text = {**tiny.TEXT, "vocab_size": 100}
    relu = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=tiny.VISION)
    )
    assert lean_tower(ImageTower(relu, ARCHITECTURES["clip"])) is None
    assert lean_tower(ImageTower(siglip, ARCHITECTURES["siglip"])) is None
