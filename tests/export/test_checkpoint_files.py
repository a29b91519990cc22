"""Checkpoint files of training programs: all layouts load, what does not fit does not, no code."""

from __future__ import annotations

import argparse
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from crl_export.checkpoint_files import architectures_of
from crl_export.exporter import export_model
from crl_export.loading import load_checkpoint
from crl_export.torchscript import read_torchscript
from crl_sdk import Embedder
from crl_sdk.errors import ExportError

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
CONFIGS = {
    "tiny-file": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-file-quickgelu": {
        "embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT,
    },
    "tiny-resnet-quickgelu": {
        "embed_dim": 24, "quick_gelu": True, "vision_cfg": RESNET, "text_cfg": TEXT,
    },
    "tiny-custom": {"embed_dim": 24, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-siglip": {
        "embed_dim": 24, "custom_text": True, "init_logit_bias": -10, "vision_cfg": VIT,
        "text_cfg": TEXT,
    },
    "tiny-deeper": {"embed_dim": 24, "vision_cfg": {**VIT, "layers": 3}, "text_cfg": TEXT},
    "tiny-larger": {"embed_dim": 24, "vision_cfg": {**VIT, "image_size": 48}, "text_cfg": TEXT},
}  # fmt: skip
NAME = "tiny-file-quickgelu"


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    """Small architectures in open_clip's list, and its own tokenizer, for one test."""
    for name, config in CONFIGS.items():
        monkeypatch.setitem(_MODEL_CONFIGS, name, config)
    # that of some names is on the hub
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_: tokenizer)


def made(name: str = NAME, seed: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    return open_clip.create_model(name)


def weights(name: str = NAME, seed: int = 5) -> dict[str, torch.Tensor]:
    return made(name, seed).state_dict()


def prefixed(state, *prefixes):
    for prefix in prefixes:
        state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    return state


def combiner() -> dict[str, torch.Tensor]:
    """The names of GeneCIS's combiner of two features, which is no CLIP."""
    names = ("text_projection_layer", "image_projection_layer", "combiner_layer", "output_layer")
    parts = {f"{name}.{part}": torch.ones(3) for name in names for part in ("weight", "bias")}
    return {**parts, "dynamic_scalar.0.weight": torch.ones(3)}


def genecis_training(state):
    """What facebookresearch/genecis writes to continue a training, in train/train_cc3m.py."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    return {
        "clip_model": prefixed(state, "module."),
        "combiner": prefixed(combiner(), "module."),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "best_val_recall": np.float64(0.25),
    }


LAYOUTS = {
    "plain": lambda state: state,
    "genecis backbone": lambda state: prefixed(state, "module."),
    "genecis training": genecis_training,
    "open_clip training": lambda state: {
        "epoch": 1, "name": "run", "state_dict": prefixed(state, "module."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "CLIP4Cir": lambda state: {"epoch": 4, "CLIP": state},
    "lightning": lambda state: {
        "state_dict": {**prefixed(state, "model."), **prefixed(combiner(), "combiner.")},
        "hyper_parameters": {"lr": 0.1},
    },
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.", "module.")},
    "beside other modules": lambda state: {**state, **prefixed(combiner(), "combiner.")},
    "with records": lambda state: {
        "args": argparse.Namespace(lr=0.1), "score": np.float32(0.5), "model": state,
    },
    "with what is derived": lambda state: {
        **state,
        "input_resolution": torch.tensor(32), "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(49408), "attn_mask": torch.zeros(12, 12),
    },
    "averaged beside": lambda state: {
        "state_dict": state,
        "state_dict_ema": {name: tensor + 1 for name, tensor in state.items()},
    },
}  # fmt: skip


def loaded(path: Path, name: str = NAME) -> dict[str, torch.Tensor]:
    return load_checkpoint(name, str(path)).image.model.state_dict()


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout, tmp_path):
    state = weights()
    torch.save(LAYOUTS[layout](state), tmp_path / "authors.pt")
    assert_equal(loaded(tmp_path / "authors.pt"), state)


@pytest.mark.parametrize("name", ["tiny-resnet-quickgelu", "tiny-custom", "tiny-siglip"])
@pytest.mark.parametrize("layout", ["genecis backbone", "genecis training"])
def test_other_kinds_of_model(name, layout, tmp_path):
    state = weights(name)
    torch.save(LAYOUTS[layout](state), tmp_path / "authors.pt")
    assert_equal(loaded(tmp_path / "authors.pt", name), state)


def test_files_of_other_forms(tmp_path):
    state = weights("tiny-resnet-quickgelu")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(loaded(tmp_path / "old.pt", "tiny-resnet-quickgelu"), state)
    save_file(prefixed(state, "module."), tmp_path / "new.safetensors")
    assert_equal(loaded(tmp_path / "new.safetensors", "tiny-resnet-quickgelu"), state)
    counts = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(counts, tmp_path / "counts.pt")
    assert_equal(loaded(tmp_path / "counts.pt", "tiny-resnet-quickgelu"), state)
    old_names = weights("tiny-file")  # of a flat model, into one with a text tower of its own
    torch.save(old_names, tmp_path / "flat.pt")
    assert loaded(tmp_path / "flat.pt", "tiny-custom")["text.ln_final.weight"].shape == (32,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in weights().items()}
    torch.save(state, tmp_path / "half.pt")
    assert_equal(loaded(tmp_path / "half.pt"), {name: t.float() for name, t in state.items()})


def test_the_authors_file_becomes_a_bundle(tmp_path):
    torch.save(genecis_training(weights()), tmp_path / "authors.pt")
    bundle = export_model(NAME, pretrained=str(tmp_path / "authors.pt"), out=tmp_path / "bundle")
    source = bundle.manifest.source
    assert source.pretrained == "authors.pt" and source.quick_gelu
    assert bundle.manifest.text is not None


@pytest.mark.parametrize("name", [NAME, "tiny-resnet-quickgelu"])
def test_an_image_tower_alone(name, tmp_path):
    """The backbone of the paper's fashion retrieval: `clip_visual`, and text tower elsewhere."""
    state = weights(name)
    visual = {key[7:]: tensor for key, tensor in state.items() if key.startswith("visual.")}
    torch.save({"epoch": 3, "clip_visual": visual, "mAP": np.float64(0.5)}, tmp_path / "b.pth")
    tower = load_checkpoint(name, str(tmp_path / "b.pth"), text=False)
    found = tower.image.model.state_dict()
    assert_equal({key: found[key] for key in found if "visual" in key}, {
        key: tensor for key, tensor in state.items() if "visual" in key
    })  # fmt: skip
    assert tower.text is None and not any(found[key].any() for key in found if "visual" not in key)
    again = load_checkpoint(name, str(tmp_path / "b.pth"), text=False, seed=9)
    assert again.source.weights_sha256 == tower.source.weights_sha256
    del visual[next(iter(visual))]
    torch.save({"clip_visual": visual}, tmp_path / "less.pth")
    with pytest.raises(ExportError, match=r"less\.pth"):
        load_checkpoint(name, str(tmp_path / "less.pth"), text=False)


def without(state, word):
    return {name: tensor for name, tensor in state.items() if word not in name}


def first_prefixed(state):
    name = next(iter(state))
    return {f"module.{name}" if own == name else own: tensor for own, tensor in state.items()}


WRONG = {
    "no image tower": (lambda s: without(s, "visual"), "missing, such as visual"),
    "one tensor less": (lambda s: without(s, "visual.proj"), "1 missing, such as visual.proj"),
    "one with a prefix": (first_prefixed, "1 missing, such as positional_embedding"),
    "a prefix of no meaning": (
        lambda s: prefixed({**s, "x.logit_scale": torch.ones(1)}, "y."),
        None,
    ),
    "no logit_scale": (lambda s: without(s, "logit_scale"), "an image tower alone: give a text"),
    "image tower": (
        lambda s: {"clip_visual": {n[7:]: t for n, t in s.items() if n.startswith("visual.")}},
        "under 'clip_visual' are an image tower alone: .*docs/MODELS.md",
    ),
    "combiner": (lambda _: combiner(), "no CLIP model .* in the file .9 tensors, such as text_p"),
    "combiner of a training": (
        lambda s: {"combiner": combiner(), "epoch": 3}, "no CLIP model .* in combiner",
    ),
    "transformers": (
        lambda s: {"vision_model.embeddings.class_embedding": torch.ones(3)}, "of transformers",
    ),
    "no tensors": (lambda _: {"epoch": 3}, "a file without tensors"),
    "a list": (lambda s: list(s.values()), "weights by name, got list"),
    "integers": (
        lambda s: {n: t.to(torch.int8) for n, t in s.items()}, "of another shape or type",
    ),
    "a larger model": (lambda _: weights("tiny-deeper"), "unexpected, such as visual.transformer"),
    "a larger picture": (
        lambda _: weights("tiny-larger"), r"positional_embedding \(37, 64\), expected \(17, 64\)",
    ),
    "siglip": (lambda _: weights("tiny-siglip"), "missing"),
    "two that fit": (
        lambda s: {"teacher": s, "student": prefixed(s, "model.")},
        "several sets .* 'teacher' and 'student.model'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case, (_, words) in WRONG.items() if words])
def test_what_does_not_fit_is_refused(case, tmp_path):
    make, words = WRONG[case]
    torch.save(make(weights()), tmp_path / "wrong.pt")
    with pytest.raises(ExportError, match=words):
        loaded(tmp_path / "wrong.pt")


def test_a_fitting_set_is_found_among_others(tmp_path):
    """A second logit_scale, with another prefix, does not keep the model from being found."""
    make, _ = WRONG["a prefix of no meaning"]
    torch.save(make(weights()), tmp_path / "odd.pt")
    assert_equal(loaded(tmp_path / "odd.pt"), weights())


def test_the_message_names_the_architecture(tmp_path):
    torch.save(weights(), tmp_path / "small.pt")
    with pytest.raises(ExportError, match="name tiny-file or tiny-file-quickgelu"):
        loaded(tmp_path / "small.pt", "tiny-deeper")


@pytest.mark.parametrize("name", ["RN50x4", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-14-336"])
def test_architectures_are_told_by_their_layers(name):
    with torch.device("meta"):
        state = open_clip.CLIP(**open_clip.get_model_config(name)).state_dict()
    names = architectures_of(state)
    assert name in names and {n.removesuffix("-quickgelu") for n in names} == {name}
    assert architectures_of({"logit_scale": torch.ones(1)}) == []


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil-ran",)


@pytest.mark.parametrize("key", ["state_dict", "optimizer", "args"])
def test_pickled_code_is_never_run(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights(), key: Evil()}, "evil.pt")
    torch.save(made(), "module.pt")
    for file in ("evil.pt", "module.pt"):
        with pytest.raises(ExportError, match="pickled code, which is never run"):
            loaded(Path(file))
    assert not Path("evil-ran").exists()


def openai_archive(path: Path, name: str = NAME) -> dict[str, torch.Tensor]:
    """Write a TorchScript archive as OpenAI's: traced, fp16, with three numbers as buffers."""
    model = made(name).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    for key, value in (("input_resolution", size), ("context_length", 12), ("vocab_size", 49408)):
        vars(model).pop(key, None)
        model.register_buffer(key, torch.tensor(value))
    inputs = torch.rand(1, 3, size, size), torch.ones(1, 12, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has replaced TorchScript
        traced = torch.jit.trace(model, inputs, check_trace=False)
        for tensor in (*traced.parameters(), *traced.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half()
        traced.save(str(path))
        return torch.jit.load(str(path)).state_dict()


@pytest.mark.parametrize("name", [NAME, "tiny-resnet-quickgelu"])
def test_openais_own_archive(name, tmp_path):
    expected = openai_archive(tmp_path / "openai.pt", name)
    assert expected["visual.conv1.weight"].dtype == torch.float16
    assert_equal(read_torchscript(tmp_path / "openai.pt"), expected)
    state = loaded(tmp_path / "openai.pt", name)
    assert state.keys() == weights(name).keys()
    assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in state.items())


def test_openais_archive_needs_quick_gelu(tmp_path):
    openai_archive(tmp_path / "openai.pt")
    with pytest.raises(ExportError, match="expected the architecture tiny-file-quickgelu"):
        loaded(tmp_path / "openai.pt", "tiny-file")


def repacked(source: Path, target: Path, change) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content, kind = change(info.filename, old.read(info))
            new.writestr(info.filename, content, kind)
    return target


def test_an_archive_with_other_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    openai_archive(tmp_path / "openai.pt")
    evil = b"cos\nmkdir\n(X\x08\x00\x00\x00evil-rantR."
    changes = {
        "code": lambda name, data: (evil if name.endswith("/data.pkl") else data, 0),
        "bomb": lambda name, data: (data, 8 if name.endswith("/data.pkl") else 0),
        "short": lambda name, data: (data[:64] if "/data/" in name else data, 0),
        "empty": lambda name, data: (b"" if name.endswith("/data.pkl") else data, 0),
        "big": lambda name, data: (b"big" if name.endswith("/byteorder") else data, 0),
    }
    for case, change in changes.items():
        path = repacked(tmp_path / "openai.pt", tmp_path / f"{case}.pt", change)
        with pytest.raises(ExportError, match=f"{case}.pt"):
            loaded(path)
    assert not Path("evil-ran").exists()


def quick_gelu_tags():
    return [
        (name, tag)
        for name, tags in _PRETRAINED.items()
        for tag, config in tags.items()
        if config.get("quick_gelu")
    ]


def shrink(name: str) -> dict:
    """An architecture of open_clip with small layers, and its activations as they are."""
    config = open_clip.get_model_config(name)
    vision = RESNET if isinstance(config["vision_cfg"]["layers"], list) else VIT
    return {**config, "embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}


@pytest.mark.parametrize(("name", "tag"), quick_gelu_tags())
def test_tags_have_the_activations_that_they_were_trained_with(name, tag, tmp_path, monkeypatch):
    """Under the name without -quickgelu too: open_clip itself would only warn."""
    monkeypatch.setitem(_MODEL_CONFIGS, name, shrink(name))
    torch.save(weights(name), tmp_path / "downloaded.pt")
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "downloaded.pt")
    )
    checkpoint = load_checkpoint(name, tag)
    assert checkpoint.source.quick_gelu and checkpoint.source.pretrained == tag
    modules = list(checkpoint.image.model.modules())
    assert any(isinstance(module, QuickGELU) for module in modules)
    assert not any(isinstance(module, torch.nn.GELU) for module in modules)


def test_other_tags_keep_the_activations_of_their_architecture(tmp_path, monkeypatch):
    monkeypatch.setitem(_MODEL_CONFIGS, "ViT-B-32", shrink("ViT-B-32"))
    torch.save(weights("ViT-B-32"), tmp_path / "downloaded.pt")
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "downloaded.pt")
    )
    assert not load_checkpoint("ViT-B-32", "laion2b_s34b_b79k").source.quick_gelu


def test_a_file_under_a_name_with_a_quickgelu_twin_is_warned_of(tmp_path):
    torch.save(weights("tiny-file"), tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match="need the architecture tiny-file-quickgelu"):
        assert not load_checkpoint("tiny-file", str(tmp_path / "mine.pt")).source.quick_gelu
    assert load_checkpoint(NAME, str(tmp_path / "mine.pt")).source.quick_gelu  # no warning


def test_a_file_has_the_preprocessing_of_its_architectures_tags(tmp_path, monkeypatch):
    """SigLIP's, for example: its mean and standard deviation are one half, and it squashes."""
    name = "ViT-B-16-SigLIP-256"
    monkeypatch.setitem(_MODEL_CONFIGS, name, CONFIGS["tiny-siglip"])
    torch.save(weights(name), tmp_path / "mine.pt")
    spec = load_checkpoint(name, str(tmp_path / "mine.pt")).image.preprocess
    assert (spec.mean, spec.std, spec.resize_mode) == ((0.5,) * 3, (0.5,) * 3, "squash")
    monkeypatch.setitem(_MODEL_CONFIGS, "ViT-L-14", CONFIGS["tiny-file"])
    torch.save(weights("tiny-file"), tmp_path / "mine.pt")
    with pytest.warns(UserWarning) as warned:
        spec = load_checkpoint("ViT-L-14", str(tmp_path / "mine.pt")).image.preprocess
    assert spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert any("differ in preprocessing" in str(warning.message) for warning in warned)


def test_a_directory_has_its_own_activations(tmp_path):
    """MetaCLIP's layout on the hub: open_clip_config.json says quick_gelu."""
    directory = tmp_path / "metaclip"
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS[NAME]}))
    save_file(weights(), directory / "open_clip_model.safetensors")
    bundle = export_model(str(directory), out=tmp_path / "bundle", text=False)
    assert bundle.manifest.source.quick_gelu


def test_metaclips_worldwide_model_from_tag_to_bundle(tmp_path, monkeypatch):
    """Its layout: an XLM tokenizer, texts pooled where they end, QuickGELU; here in small."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{w}" for w in ("a", "cat", "rot", "Käse", "猫"))]
    model = tokenizers.models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=3)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    monkeypatch.undo()
    name = "ViT-H-14-worldwide"
    text = {
        **open_clip.get_model_config(name)["text_cfg"],
        **TEXT,
        "vocab_size": len(words),
        "context_length": 77,
    }
    monkeypatch.setitem(_MODEL_CONFIGS, name, {**shrink(name), "text_cfg": text})
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: fast)
    state = weights(name)
    torch.save(state, tmp_path / "downloaded.pt")
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "downloaded.pt")
    )
    bundle = export_model(name, pretrained="metaclip2_worldwide", out=tmp_path / "bundle")
    assert bundle.manifest.source.quick_gelu
    theirs = open_clip.create_model(name, force_quick_gelu=True).eval()
    theirs.load_state_dict(state)
    texts = ["a cat", "Käse rot", "猫"]
    with torch.inference_mode():
        expected = theirs.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    with Embedder.open(bundle, engine="onnx/cpu/fp32") as embedder:
        np.testing.assert_allclose(embedder.embed_text(texts), expected, atol=1e-5)
