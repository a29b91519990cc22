"""A directory in the format of Hugging Face: preprocessing in all its forms, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_hugging_face as tiny
from crl_export.exporter import export_model
from crl_export.hugging_face.checkpoint import load_directory, read_preprocessing
from crl_sdk.errors import ExportError
from crl_sdk.model import PreprocessSpec

pytestmark = pytest.mark.filterwarnings("ignore")

OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
MEANS = {"image_mean": list(OPENAI["mean"]), "image_std": list(OPENAI["std"])}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "clip"
    tiny.clip(folder)
    return folder


@pytest.fixture
def folder(clip, tmp_path):
    """A copy of a model to damage."""
    return Path(shutil.copytree(clip, tmp_path / "model"))


def refused(folder: Path, message: str, **options) -> None:
    """The export is refused, and leaves nothing behind."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ExportError, match=message):
        export_model(str(folder), out=folder.parent / "bundle", **options)
    assert sorted(folder.parent.iterdir()) == before


def edit(path: Path, **values) -> None:
    config = json.loads(path.read_text())
    for key, value in values.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    path.write_text(json.dumps(config))


# --- preprocessing


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (  # OpenAI's repositories, 2022
            {
                "feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224,
                "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
                **MEANS,
            },
            {},
        ),
        ({"image_processor_type": "CLIPImageProcessor"}, {}),
        (
            {"image_processor_type": "CLIPImageProcessor", "resample": 2},
            {"interpolation": "bilinear"},
        ),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, {"resize": (256, 256)}),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 96}},
            {
                "height": 64, "width": 96, "resize_mode": "squash", "mean": (0.5,) * 3,
                "std": (0.5,) * 3,
            },
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": 96},
            {
                "height": 96, "width": 96, "resize_mode": "squash", "mean": (0.5,) * 3,
                "std": (0.5,) * 3, "interpolation": "bilinear",
            },
        ),
        ({"image_processor_type": "CLIPImageProcessorFast", **MEANS}, {}),
    ],
    ids=["2022", "defaults", "bilinear", "256", "siglip", "vit", "fast"],
)  # fmt: skip
def test_preprocessing_of_all_ages(settings, expected, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = {"height": 224, "width": 224, **OPENAI, **expected}
    assert read_preprocessing(tmp_path, None) == PreprocessSpec(**spec)


def test_a_crop_that_the_file_does_not_say_is_the_towers_input(tmp_path):
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256}}
    content = json.dumps({**settings, "do_center_crop": False})
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text(content)
    expected = PreprocessSpec(224, 224, **OPENAI, resize=(256, 256))
    assert read_preprocessing(tmp_path, (224, 224)) == expected
    with pytest.raises(ExportError, match="do_center_crop"):
        read_preprocessing(tmp_path, None)


def test_preprocessing_inside_processor_config(tmp_path):
    """As transformers 5 writes it."""
    nested = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 96},
              "crop_size": {"height": 96, "width": 96}}  # fmt: skip
    content = {"processor_class": "CLIPProcessor", "image_processor": nested}
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert read_preprocessing(tmp_path, None) == PreprocessSpec(96, 96, **OPENAI)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"image_processor_type": "Siglip2ImageProcessor"},
        {"image_processor_type": "DonutImageProcessor"},
        {"image_processor_type": "NoSuchProcessor"},
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False},
        {"image_processor_type": "CLIPImageProcessor", "resample": 0},
        {"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 224}},
        {"image_processor_type": "CLIPImageProcessor", "image_mean": "none"},
        [],
    ],
)
def test_other_preprocessing_is_refused(settings, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    refused(folder, "preprocessor_config.json")


def test_preprocessing_of_another_size_is_refused(folder):
    edit(folder / "preprocessor_config.json", crop_size=10**9, size={"shortest_edge": 10**9})
    refused(folder, r"1000000000×1000000000 pixels, expected 1 to 4096")
    edit(folder / "preprocessor_config.json", crop_size=64, size={"shortest_edge": 64})
    refused(folder, r"cannot embed images of 64×64 pixels .*the preprocessing is of another model")


# --- weights


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"x")
    refused(folder, r"has no weights; expected model.safetensors or pytorch_model.bin")


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, r"model.safetensors: not a complete file of safetensors .* download it again")


@pytest.mark.parametrize("header", [2**62, 2**27, 8])
def test_a_header_that_claims_too_much(header, folder):
    (folder / "model.safetensors").write_bytes(header.to_bytes(8, "little") + b'{"a": 1}')
    refused(folder, r"model.safetensors: not a complete file of safetensors")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_code_never_runs(zipped, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    path = folder / "pytorch_model.bin"
    payload = {"logit_scale": Payload(f"touch {marker}")}
    if zipped:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    refused(folder, "with tensors only: get the files again")
    assert not marker.exists()


def test_weights_of_pytorch_are_read_as_tensors(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_directory(folder).image is not None
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-2000])
    refused(folder, "tensors only: get the files again")


def test_foreign_weights(folder):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"weights of CLIPModel are missing or of another shape")


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", projection_dim=24)
    refused(folder, "CLIPModel")


def test_a_missing_shard(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict.fromkeys(names[at::2]) for at in (0, 1)]
    for shard, part in zip(shards, parts, strict=True):
        save_file({n: weights[n] for n in part}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}}
    index |= {"weight_map": {n: s for s, part in zip(shards, parts, strict=True) for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_directory(folder).image is not None
    (folder / shards[1]).unlink()
    refused(folder, rf"{shards[1]}: missing, one of 2 files of weights; download it too")
    index["weight_map"][names[0]] = "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"index.json: names '../other.safetensors', which is not a file of")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, r"has no `weight_map`")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, rf"{name}: a pointer of Git LFS.*git lfs pull")


def test_links(folder, tmp_path):
    path = folder / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, "model.safetensors: a link that leads out of the directory")
    path.unlink()
    path.symlink_to(folder / "nothing")
    refused(folder, "a link to nothing; download it again")
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    refused(folder, "model.safetensors: not a file")


def test_links_of_the_cache_of_huggingface_hub(clip, tmp_path):
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for at, path in enumerate(sorted(clip.iterdir())):
        shutil.copy(path, repository / "blobs" / str(at))
        (snapshot / path.name).symlink_to(f"../../blobs/{at}")
    assert load_directory(snapshot).source.pretrained == f"owner/tiny@{snapshot.name}"


# --- configurations


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_config__num_hidden_layers", 10**9),
        ("text_config__hidden_size", 10**12),
        ("text_config__vocab_size", -1),
        ("projection_dim", 0),
        ("vision_config__num_channels", 10**9),
        ("vision_config__image_size", 10**6),
        ("text_config__max_position_embeddings", 10**9),
        ("num_block_repeats", [1, 10**6]),
        ("depth_coefficient", 1e9),
    ],
)
def test_sizes_out_of_bounds(key, value, folder):
    edit(folder / "config.json", **{key: value})
    refused(folder, rf"config.json: {key.rpartition('__')[2]} is .*, expected 1 to")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model_type": ', b"\xff\xfe", b"{}" * 3])
def test_damaged_configurations(content, folder):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json|cannot be exported")


@pytest.mark.parametrize(
    ("key", "value"), [("vision_config__hidden_size", "wide"), ("text_config", "none")]
)
def test_configurations_of_other_types(key, value, folder):
    edit(folder / "config.json", **{key: value})
    refused(folder, "cannot|config.json")
    refused(folder, "cannot|config.json", pretrained="none")


def test_code_of_a_repository_never_runs(folder, tmp_path):
    marker = tmp_path / "ran"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModel": "modeling_evil.Model",
        },
    )
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]},
    )
    edit(
        folder / "preprocessor_config.json",
        auto_map={"AutoImageProcessor": "processing_evil.P"},
    )
    load_directory(folder)  # a known type of model needs none of it
    assert not marker.exists()
    edit(folder / "config.json", model_type="evil")
    refused(folder, "no code of a repository is run")
    edit(folder / "config.json", model_type="clip")
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    edit(folder / "preprocessor_config.json", image_processor_type="EvilProcessor")
    refused(folder, "preprocessor_config.json")
    assert not marker.exists()


# --- tokenizers


def test_no_tokenizer(folder):
    for path in folder.iterdir():
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            path.unlink()
    refused(folder, r"has no tokenizer; expected one of tokenizer.json, .*--no-text")
    assert load_directory(folder, text=False).image is not None


def test_a_tokenizer_with_more_tokens_than_the_tower(folder):
    edit(folder / "config.json", text_config__vocab_size=40000)
    weights = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = weights[name][:40000].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder, r"embeddings of 40,000 tokens, its tokenizer 49,408 tokens: the tokenizer is of"
    )


def test_a_token_that_was_added_needs_no_embedding(folder, tmp_path):
    """BLIP-2's processor has `<image>`, which its text tower does not know."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    assert tokenizer.convert_tokens_to_ids("<image>") == 49408
    tokenizer.save_pretrained(folder)
    assert export_model(str(folder), out=tmp_path / "b").manifest.text is not None


def test_the_tokenizer_of_another_model(folder):
    for path in folder.iterdir():
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            path.unlink()
    tiny_tokenizers.bert(folder)
    tiny_tokenizers.bert_configured(folder, 77)
    refused(folder, r"texts end with the token id 3, .* reads its embedding at 49407")


def test_a_context_length_that_the_tower_cannot_read(folder, tmp_path):
    refused(folder, r"reads 77 tokens, got --context-length 78", context_length=78)
    assert load_directory(folder, context_length=20).text.tokenizer.context_length == 20


def test_context_lengths_of_other_towers(tmp_path):
    tiny.altclip(tmp_path / "altclip")  # of 514 positions, those of XLM-R leave 512 for tokens
    longest = load_directory(tmp_path / "altclip", context_length=512).text
    ids = torch.from_numpy(longest.tokenizer.ids(["a photo " * 600]))
    with torch.inference_mode():
        assert longest.model.encode_text(ids).isfinite().all()
    with pytest.raises(ExportError, match="reads 512 tokens, got --context-length 513"):
        load_directory(tmp_path / "altclip", context_length=513)
    tiny.siglip(tmp_path / "siglip")
    with pytest.raises(ExportError, match="reads its padding, and was trained with 64 tokens"):
        load_directory(tmp_path / "siglip", context_length=16)


@pytest.mark.parametrize("kind", ["altclip", "align", "metaclip_2"])
def test_padding_does_not_change_an_embedding(kind, tmp_path):
    getattr(tiny, kind)(tmp_path / kind)
    rows = []
    for length in (12, 40):
        part = load_directory(tmp_path / kind, context_length=length).text
        with torch.inference_mode():
            ids = part.tokenizer.ids(["a photo of a cat"])
            rows.append(part.model.encode_text(torch.from_numpy(ids), normalize=True))
    assert (rows[0] - rows[1]).abs().max() < 1e-6
