"""Decoding of photographs, exact and fast: time, rate and drift, from 224² to 48 megapixels.

`python -m crl_benchmarks.photos BUNDLE` makes photographs of each size from small ones: those that
scikit-learn and Matplotlib ship, and those of `--data`. Half of them are enlarged and get the noise
of a sensor. The others are mosaics of small photographs at their own size, whose detail is finer
than any camera's. All ways of decoding take turns. The drift is measured in the pixels and in the
embeddings, and that of int8 on the same photographs stands beside it.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_sdk import Embedder, demo_bundle
from crl_sdk.model import _fast_resize
from crl_sdk.model._image_files import find_image_files
from crl_sdk.model._preprocess import Decode, PreprocessSpec, load_pixels

SIZES = ((224, 224), (640, 480), (1280, 720), (1920, 1080), (4032, 3024), (8000, 6000))
"""Widths and heights in pixels."""

QUALITY = 92
NOISE = 4.0
"""Standard deviation of the noise of the enlarged photographs, in levels."""

WAYS: dict[str, tuple[Decode, bool]] = {
    "exact": ("exact", True),
    "fast": ("fast", True),
    "fast, Pillow": ("fast", False),
}
"""Ways of decoding: the option of `load_pixels`, and whether cykooz-resizer may be used."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one way of decoding photographs of one size.

    Attributes:
        size: Width and height in pixels.
        megabytes: Mean size of the files.
        way: Key of `WAYS`.
        milliseconds: Median processor time of one photograph.
        levels: Mean and largest difference from exact decoding, in levels of 255.
        drift: Mean and largest 1 − cosine with the embedding after exact decoding, by model.
        rate: Photographs per second that the int8 engine embeds, with decoding.
    """

    size: tuple[int, int]
    megabytes: float
    way: str
    milliseconds: float
    levels: tuple[float, float]
    drift: dict[str, tuple[float, float]]
    rate: float


def small_photographs(data: Path | None) -> list[Image.Image]:
    """Return the photographs that the others are made from.

    Args:
        data: Directory of further photographs, or None.
    """
    import matplotlib
    import sklearn.datasets

    images = Path(sklearn.datasets.__file__).parent / "images"
    shipped = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    paths: list[Path] = [images / "china.jpg", images / "flower.jpg", shipped]
    if data is not None:
        paths += find_image_files([data])
    return [Image.open(path).convert("RGB") for path in paths]


def make_photographs(
    small: Sequence[Image.Image], size: tuple[int, int], count: int, rng: np.random.Generator
) -> list[bytes]:
    """Make JPEGs of a size: by turns an enlarged photograph and a mosaic."""
    made = []
    for i in range(count):
        if i % 2:
            image = mosaic(small, size, rng)
        else:
            image = enlarged(small[i // 2 % len(small)], size, rng)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        made.append(file.getvalue())
    return made


def enlarged(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return an enlarged photograph with noise."""
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32)
    pixels = pixels + NOISE * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def mosaic(
    small: Sequence[Image.Image], size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """Return a mosaic of photographs at their own size."""
    side = min(224, *size)
    whole = Image.new("RGB", size)
    for x in range(0, size[0], side):
        for y in range(0, size[1], side):
            image = small[int(rng.integers(len(small)))]
            left = int(rng.integers(max(image.width - side, 0) + 1))
            top = int(rng.integers(max(image.height - side, 0) + 1))
            whole.paste(image.crop((left, top, left + side, top + side)), (x, y))
    return whole


@contextmanager
def resizer(name: str) -> Iterator[Decode]:
    """Use the library of a way of decoding inside the context; yield its option."""
    decode, vectorised = WAYS[name]
    kept = _fast_resize.cykooz
    if not vectorised:
        _fast_resize.cykooz = None
    try:
        yield decode
    finally:
        _fast_resize.cykooz = kept


def measure(
    size: tuple[int, int],
    photographs: Sequence[bytes],
    towers: dict[str, Embedder],
    engine: Embedder,
    rounds: int,
) -> list[Row]:
    """Measure all ways of decoding.

    Args:
        size: Width and height of the photographs.
        photographs: The JPEGs.
        towers: Models to measure the drift of embeddings with.
        engine: Model to measure the rate with.
        rounds: Number of rounds. In each, the ways take turns.
    """
    spec = engine.bundle.preprocess
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            with resizer(way) as decode:
                times[way] += [processor_time(data, spec, decode) for data in photographs]
                rates[way].append(embedding_rate(engine, photographs, decode))
    megabytes = float(np.mean([len(data) for data in photographs])) / 1e6
    rows = []
    for way in WAYS:
        with resizer(way) as decode:
            levels = difference(photographs, spec, decode)
            drifts = {name: drift(tower, photographs, decode) for name, tower in towers.items()}
        rate = float(np.median(rates[way]))
        milliseconds = 1e3 * float(np.median(times[way]))
        rows.append(Row(size, megabytes, way, milliseconds, levels, drifts, rate))
    return rows


def processor_time(data: bytes, spec: PreprocessSpec, decode: Decode) -> float:
    """Return the processor time of decoding one image, in seconds."""
    started = time.thread_time()
    load_pixels(data, spec, decode=decode)
    return time.thread_time() - started


def embedding_rate(embedder: Embedder, photographs: Sequence[bytes], decode: Decode) -> float:
    """Return the photographs per second of `Embedder.embed`."""
    wanted = max(32, len(photographs))
    many = [photographs[i % len(photographs)] for i in range(wanted)]
    with Embedder.open(embedder.bundle, engine=embedder.engine, decode=decode) as own:
        own.embed(many[:2])
        started = time.perf_counter()
        own.embed(many)
        return wanted / (time.perf_counter() - started)


def difference(
    photographs: Sequence[bytes], spec: PreprocessSpec, decode: Decode
) -> tuple[float, float]:
    """Return the mean and the largest difference from exact decoding, in levels."""
    each = [
        np.abs(load_pixels(data, spec).astype(np.int16) - load_pixels(data, spec, decode=decode))
        for data in photographs
    ]
    return float(np.mean(each)), float(np.max(each))


def drift(tower: Embedder, photographs: Sequence[bytes], decode: Decode) -> tuple[float, float]:
    """Return the mean and the largest 1 − cosine with the embedding after exact decoding."""
    spec = tower.bundle.preprocess
    exact, other = (
        tower.embed([load_pixels(data, spec, decode=way) for data in photographs]).universal
        for way in ("exact", decode)
    )
    return one_minus_cosine(exact, other)


def one_minus_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean and the largest 1 − cosine of the rows of two arrays of unit rows."""
    apart = np.square(a.astype(np.float64) - b).sum(axis=1) / 2
    return float(apart.mean()), float(apart.max())


def as_table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    models = list(rows[0].drift)
    head = [
        "pixels", "file, MB", "decoding", "ms", "times as fast", "levels, mean / max",
        *(f"1 − cosine, {name}, mean / max" for name in models), "embedded, /s",
    ]  # fmt: skip
    exact = {row.size: row.milliseconds for row in rows if row.way == "exact"}
    cells = [
        [
            f"{row.size[0]} × {row.size[1]}", f"{row.megabytes:.2f}", row.way,
            f"{row.milliseconds:.2f}", f"{exact[row.size] / row.milliseconds:.1f}",
            f"{row.levels[0]:.2f} / {row.levels[1]:.0f}",
            *(f"{mean:.1e} / {most:.1e}" for mean, most in row.drift.values()),
            f"{row.rate:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, cells)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="a bundle in fp32 and int8, such as a random ViT-B/32")
    parser.add_argument("--data", type=Path, help="directory of further small photographs")
    parser.add_argument("--count", type=int, default=12, help="photographs of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="writes OUT.md")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    data = arguments.data if arguments.data and arguments.data.is_dir() else None
    small = small_photographs(data)
    with (
        Embedder.open(arguments.bundle, engine="onnx/cpu/fp32") as fp32,
        Embedder.open(arguments.bundle, engine="onnx/cpu/int8") as int8,
        Embedder.open(demo_bundle()) as demo,
    ):
        towers = {fp32.bundle.manifest.name: fp32, "demo model": demo}
        rows, by_int8 = [], []
        for size in SIZES:
            count = arguments.count if size[0] * size[1] < 20e6 else arguments.count // 3
            photographs = make_photographs(small, size, count, rng)
            rows += measure(size, photographs, towers, int8, arguments.rounds)
            pixels = [load_pixels(data, fp32.bundle.preprocess) for data in photographs]
            a, b = (each.embed(pixels, batch_size=1).universal for each in (fp32, int8))
            by_int8.append(one_minus_cosine(a, b))
            print(as_table(rows[-len(WAYS) :]), flush=True)
    machine = describe_machine()
    text = (
        "# Decoding photographs\n\n"
        f"`make bench-photos` at {describe_commit()}, on {machine['processor']} "
        f"({machine['cores']} cores, {machine['features']}), from {len(small)} small photographs. "
        f"{fp32.bundle.manifest.name} has random weights; the demo model is trained, on other "
        "images, and sees 96 × 96 pixels. Milliseconds are processor time of one thread. "
        f"The rate is that of `Embedder.embed` with {int8.engine}.\n\n"
        f"{as_table(rows)}\n\n"
        f"Int8 itself drifts by {np.mean([mean for mean, _ in by_int8]):.1e} in the mean, and by "
        f"{max(most for _, most in by_int8):.1e} at most, on the same photographs.\n"
    )
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
