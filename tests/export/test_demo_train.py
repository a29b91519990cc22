"""A training run of a few steps, and its checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")
pytest.importorskip("sklearn")

from crl_export.demo import model as demo_model  # noqa: E402
from crl_export.demo import train as demo_train  # noqa: E402
from crl_export.demo.loss import readout_loss, truth_loss  # noqa: E402

SMOKE = demo_train.TrainingSettings(images=48, test_images=40, steps=3, batch=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, demo_train.train(directory, SMOKE)


def test_a_run_leaves_a_checkpoint_and_its_record(run):
    directory, record = run
    assert json.loads((directory / demo_train.RECORD_FILE).read_text()) == record
    assert record["settings"]["steps"] == 3
    assert {row["criterion"] for row in record["clustering"]} == {
        "shape", "colour", "texture", "count",
    }  # fmt: skip
    model, tokenizer = demo_model.load_checkpoint(directory)
    embed = demo_model.text_embedder(model, tokenizer)
    rows = embed(["a photo of red", "ten zigzag hearts \N{SNOWMAN} \u4e2d"])
    assert rows.shape == (2, demo_model.MODEL_CONFIG["embed_dim"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_equal_settings_give_equal_weights(run, tmp_path):
    directory, _ = run
    demo_train.train(tmp_path, SMOKE)
    first, second = (demo_model.load_checkpoint(d)[0].state_dict() for d in (directory, tmp_path))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-5, rtol=1e-4, msg=name)


def test_it_fits_into_the_bundle():
    parameters = sum(p.numel() for p in demo_model.create_model().parameters())
    assert parameters < 2_200_000


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected open_clip_config"):
        demo_model.load_checkpoint(tmp_path)


def test_trimmed_encoding_equals_open_clips(run):
    model, tokenizer = demo_model.load_checkpoint(run[0])
    tokens = tokenizer(["red", "a photo of three small crimson striped stars on grey"])
    with torch.inference_mode():
        full = model.encode_text(tokens, normalize=True)
        trimmed = demo_model.encode_trimmed(model, tokens)
    torch.testing.assert_close(trimmed, full, atol=1e-5, rtol=0)


def test_trimmed_vocabulary_is_a_prefix_of_clips(run):
    _, tokenizer = demo_model.load_checkpoint(run[0])
    assert tokenizer.vocab_size == demo_model.MODEL_CONFIG["text_cfg"]["vocab_size"]
    text = "Any text at all, \u00fcber-long words and emoji \U0001f600 too"
    assert tokenizer.decode(tokenizer.encode(text)).split() == (
        ["any", "text", "at", "all", ",", "über", "-", "long", "words", "and", "emoji", "😀", "too"]
    )


def test_loss_weighs_true_and_false_images_alike():
    truth = torch.tensor([[True, False, True], [False, False, True], [False, True, True]])
    assert truth_loss(torch.zeros(3, 3), truth).item() == pytest.approx(math.log(2))
    sure = torch.where(truth, 20.0, -20.0)
    assert truth_loss(sure, truth).item() < 1e-6
    # one wrong positive of one costs half of the caption, one wrong negative of two a quarter
    wrong_positive, wrong_negative = sure.clone(), sure.clone()
    wrong_positive[0, 0] = -20
    wrong_negative[1, 0] = 20
    assert truth_loss(wrong_positive, truth).item() == pytest.approx(20 / 2 / 3, rel=1e-3)
    assert truth_loss(wrong_negative, truth).item() == pytest.approx(20 / 4 / 3, rel=1e-3)


def test_readout_averages_the_factors():
    codes = torch.tensor([[0, 2], [1, 0]])
    assert readout_loss(torch.zeros(2, 5), codes, (2, 3)).item() == pytest.approx(
        (math.log(2) + math.log(3)) / 2
    )
    sure = torch.tensor([[30.0, 0, 0, 0, 30], [0, 30, 30, 0, 0]])
    assert readout_loss(sure, codes, (2, 3)).item() < 1e-6


def test_augmentation_keeps_shape_and_is_seeded():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 24, 24, 3), np.uint8)
    one, two = (demo_train.augment(pixels, np.random.default_rng(3)) for _ in range(2))
    assert one.shape == pixels.shape
    assert one.flags.c_contiguous
    np.testing.assert_array_equal(one, two)
    assert (one != pixels).any()


def test_learning_rate_rises_then_falls_to_zero():
    settings = replace(SMOKE, steps=1000, warmup=0.1)
    rates = [demo_train.learning_rate(step, settings) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100)
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert rates[-1] < 1e-5
