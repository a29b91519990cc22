"""Train the demo CLIP from fixed seeds: `python -m crl_export.demo.train OUT_DIR`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crl_export.demo import model as demo_model
from crl_export.demo.captions import CODES, NEUTRAL_PROMPT, Captioner, filler_words, true_of
from crl_export.demo.dataset import (
    MONITOR_SEED,
    TEST_SEED,
    TRAIN_SEED,
    labels_of,
    render_arrays,
)
from crl_export.demo.evaluate import as_table, evaluate, kmeans_accuracy, own_words
from crl_export.demo.lexicon import OFF_TOPIC
from crl_export.demo.loss import readout_loss, truth_loss
from crl_export.demo.world import CRITERIA, FACTORS
from crl_export.encoders import ClipModel
from crl_sdk._processors import count_processors
from crl_sdk.basis._methods import make_projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from open_clip.tokenizer import SimpleTokenizer

RECORD_FILE = "training.json"
_MONITOR_IMAGES = 600
_MAX_LOGIT_SCALE = math.log(100)

log = logging.getLogger("crl.demo.train")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings of a training run. Together with the code they determine its result.

    Attributes:
        images: Number of training scenes.
        test_images: Number of held-out scenes of the final table.
        steps: Number of optimiser steps.
        batch: Number of images, and of captions, per step.
        learning_rate: Highest learning rate of the schedule.
        warmup: Share of the steps in which the rate rises.
        weight_decay: Weight decay of AdamW, for matrices only.
        ema_decay: Decay of the averaged weights, which are the ones that are kept.
        readout: Initial weight of the loss that predicts the factors from the image embedding. It
            falls to zero by the middle of the run, and its linear layer is discarded.
        fillers: Number of frequent words of CLIP that captions may contain without meaning.
        seed: Seed of the weights, the batches and the captions.
        threads: Number of torch's threads. With several, the last bits of sums depend on the
            machine.
    """

    images: int = 30_000
    test_images: int = 3_000
    steps: int = 4_000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    readout: float = 0.5
    fillers: int = 20_000
    seed: int = 0
    threads: int = 2


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step: a linear rise, then a cosine down to zero."""
    rise = max(1, int(settings.warmup * settings.steps))
    if step < rise:
        return settings.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(1, settings.steps - rise)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def augment(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rotate, mirror and shift images. No factor depends on these changes.

    Args:
        pixels: Images, shape (n, side, side, 3), uint8.
        rng: Source of random choices. Groups of the batch share one choice.

    Returns:
        Images of the same shape, uint8, contiguous.
    """
    reach = max(1, pixels.shape[1] // 24)
    out = np.empty_like(pixels)
    for group in np.array_split(np.arange(len(pixels)), 8):
        part = np.rot90(pixels[group], int(rng.integers(4)), axes=(1, 2))
        if rng.random() < 0.5:
            part = part[:, :, ::-1]
        dy, dx = (int(s) for s in rng.integers(0, 2 * reach + 1, 2))
        padded = np.pad(part, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        side = pixels.shape[1]
        out[group] = padded[:, dy : dy + side, dx : dx + side]
    return out


def _optimiser(modules: Sequence[torch.nn.Module], settings: TrainingSettings) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters()]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


@torch.no_grad()
def _follow(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights and running statistics one step towards the model's."""
    current = model.state_dict()
    for name, tensor in averaged.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(current[name], 1 - decay)
        else:
            tensor.copy_(current[name])


def fit(
    model: ClipModel,
    tokenizer: SimpleTokenizer,
    pixels: NDArray[np.uint8],
    codes: NDArray[np.int64],
    settings: TrainingSettings,
    *,
    monitor: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None,
    every: int = 250,
) -> tuple[ClipModel, list[dict[str, float]]]:
    """Train `model` in place.

    Args:
        model: Model from `model.create_model`.
        tokenizer: Tokenizer from `model.write_tokenizer`.
        pixels: Images, shape (n, side, side, 3), uint8.
        codes: `Scene.codes()` of the images, shape (n, number of factors), int64.
        settings: Settings of the training run.
        monitor: Held-out images and codes for measurements during training.
        every: Number of steps between two entries of the history.

    Returns:
        The model with averaged weights, in eval mode, and the history of the run.
    """
    rng = np.random.default_rng([settings.seed, 0x7A1])
    captioner = Captioner(filler_words(demo_model.general_words(), OFF_TOPIC)[: settings.fillers])
    sizes = [len(FACTORS[criterion]) for criterion in CRITERIA]
    columns = [CODES[criterion] for criterion in CRITERIA]
    readout = torch.nn.Linear(demo_model.MODEL_CONFIG["embed_dim"], sum(sizes))
    optimiser = _optimiser((model, readout), settings)
    averaged = copy.deepcopy(model).eval()
    history: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.perf_counter()
    order = np.empty(0, np.int64)
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = rng.permutation(len(pixels))
        chosen, order = order[: settings.batch], order[settings.batch :]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)

        captions = [captioner.caption(scene, rng) for scene in codes[chosen]]
        claims = np.array([caption.claims for caption in captions], np.int64)
        truth = torch.from_numpy(true_of(claims, codes[chosen]))
        images = demo_model.normalise(augment(pixels[chosen], rng))
        images = images.contiguous(memory_format=torch.channels_last)

        embeddings = model.encode_image(images)
        image_rows = torch.nn.functional.normalize(embeddings, dim=-1)
        text_rows = demo_model.encode_trimmed(model, tokenizer([c.text for c in captions]))
        logits = model.logit_scale.exp() * image_rows @ text_rows.T + model.logit_bias
        loss = truth_loss(logits, truth)
        share = settings.readout * max(0.0, 1 - 2 * step / settings.steps)
        if share:
            known = torch.from_numpy(codes[chosen][:, columns])
            loss = loss + share * readout_loss(readout(embeddings), known, sizes)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
        _follow(averaged, model, min(settings.ema_decay, (step + 1) / (step + 10)))
        losses.append(loss.item())

        if (step + 1) % every == 0 or step + 1 == settings.steps:
            entry = {"step": step + 1, "loss": round(float(np.mean(losses)), 4)}
            entry["seconds"] = round(time.perf_counter() - started, 1)
            losses.clear()
            if monitor is not None:
                entry |= quick_accuracies(averaged, tokenizer, *monitor)
            history.append(entry)
            log.info("%s", json.dumps(entry))
    return averaged, history


def quick_accuracies(
    model: ClipModel,
    tokenizer: SimpleTokenizer,
    pixels: NDArray[np.uint8],
    codes: NDArray[np.int64],
) -> dict[str, float]:
    """Return the clustering accuracy of each criterion's conditional embeddings (one seed)."""
    images = demo_model.embed_images(model, pixels)
    embed_texts = demo_model.text_embedder(model, tokenizer)
    accuracies = {}
    for criterion in CRITERIA:
        texts = embed_texts([NEUTRAL_PROMPT.format(word) for word in own_words(criterion)])
        embeddings = make_projection(texts, "cosine").apply(images)
        accuracy = kmeans_accuracy(embeddings, codes[:, CODES[criterion]], seeds=(0,))
        accuracies[criterion] = round(accuracy, 4)
    return accuracies


def train(directory: Path, settings: TrainingSettings) -> dict[str, Any]:
    """Render the scenes, train, measure, and write the checkpoint directory and its record.

    Args:
        directory: Directory, created if missing. It receives the files that
            `model.load_checkpoint` reads, and `training.json`.
        settings: Settings of the training run.

    Returns:
        The record, as written.
    """
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    side = demo_model.IMAGE_SIZE
    log.info("rendering %d + %d scenes", settings.images, settings.test_images)
    pixels, codes = render_arrays(settings.images, TRAIN_SEED, side)
    test_pixels, test_codes = render_arrays(settings.test_images, TEST_SEED, side)
    monitor = render_arrays(min(_MONITOR_IMAGES, settings.images), MONITOR_SEED, side)
    rendered = time.perf_counter()
    log.info("rendered in %.0f s", rendered - started)

    tokenizer = demo_model.write_tokenizer(directory)
    demo_model.write_config(directory)
    model = demo_model.create_model().to(memory_format=torch.channels_last).train()
    model, history = fit(model, tokenizer, pixels, codes, settings, monitor=monitor)
    demo_model.save_weights(model, directory)
    trained = time.perf_counter()

    # measure the files that were written, not the model in memory
    model, tokenizer = demo_model.load_checkpoint(directory)
    rows = evaluate(
        demo_model.embed_images(model, test_pixels),
        demo_model.text_embedder(model, tokenizer),
        labels_of(test_codes),
    )
    log.info("on %d held-out scenes:\n%s", len(test_pixels), as_table(rows))
    usage = os.times()
    record = {
        "settings": asdict(settings),
        "data_seeds": {"train": TRAIN_SEED, "test": TEST_SEED, "monitor": MONITOR_SEED},
        "versions": _versions(("torch", "open_clip_torch", "numpy", "pillow", "scikit-learn")),
        "machine": {"processor": platform.machine(), "cpus": count_processors()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {
            "render": round(rendered - started, 1),
            "train": round(trained - rendered, 1),
            "total": round(time.perf_counter() - started, 1),
            "cpu": round(usage.user + usage.system + usage.children_user, 1),
        },
        "history": history,
        "clustering": [asdict(row) for row in rows],
    }
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return record


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="directory of the checkpoint to write")
    parser.add_argument("--steps", type=int, default=TrainingSettings().steps)
    parser.add_argument("--images", type=int, default=TrainingSettings().images)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # sums of tiny numbers are slow on CPUs
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.directory, TrainingSettings(steps=arguments.steps, images=arguments.images))


if __name__ == "__main__":
    main()
