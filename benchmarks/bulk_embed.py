"""Bulk embedding beside the engine alone: what reading, decoding and writing cost.

`python -m crl_benchmarks.bulk_embed` measures in every round, in turns and on the same pictures:

- `engine`: runs of the engine on pixels that are decoded already, and nothing else.
- `decoding`: the decoding threads alone, on bytes in memory.
- `bulk`: a job of `crl_sdk.bulk` from a tar archive to a part on the disk, with an open model.

On a CPU, decoding and the engine need the same cores, so that the processor time of each is
measured as well.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_benchmarks.thumbnails import EVERY, thumbnails
from crl_sdk import Embedder, demo_bundle
from crl_sdk.bulk import BulkJob, make_part, open_job_embedder
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored._directory import EmbeddingDirectory, to_numpy

_TOLERANCE = 1e-6
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Rates:
    """Pictures per second, medians of all rounds.

    Attributes:
        case: Name of the model, the engine and the pictures.
        count: Number of pictures of a round.
        engine: Rate of the engine alone.
        decoding: Rate of decoding alone, with all threads.
        bulk: Rate of the job.
        of_engine: The job's rate, divided by the engine's; median of the rounds.
        processor: Processor time of a picture in milliseconds: the engine's, decoding's, the job's.
    """

    case: str
    count: int
    engine: float
    decoding: float
    bulk: float
    of_engine: float
    processor: tuple[float, float, float]


def write_tar(path: Path, pictures: Sequence[bytes]) -> None:
    """Write encoded pictures into a tar archive."""
    with tarfile.open(path, "w") as archive:
        for i, data in enumerate(pictures):
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def seconds_of(run: Callable[[], object]) -> tuple[float, float]:
    """Return how long a call takes, and the processor time of all threads, in seconds."""
    started, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - used


def measure(
    name: str, model: tuple[Path, str], pictures: Sequence[bytes], rounds: int, work: Path
) -> Rates:
    """Measure one model on some pictures.

    Args:
        name: Name of the pictures.
        model: Bundle and engine.
        pictures: Encoded pictures, all readable.
        rounds: Number of rounds, after one of warm-up.
        work: Directory for the archive and the parts.

    Raises:
        AssertionError: If the job's embeddings are not those of the engine.
    """
    bundle, engine = model
    count = len(pictures)
    archive = work / "pictures.tar"
    write_tar(archive, pictures)
    with Embedder.open(bundle, engine=engine) as embedder:
        dim = embedder.bundle.embedding_dim
        weight, bias = np.zeros((dim, 0), np.float32), np.zeros(0, np.float32)

        def decode() -> list[np.ndarray]:
            return list(embedder.decode_pool.map(embedder.load_pixels, pictures))

        decoded = decode()
        batches = [np.stack(decoded[i : i + _BATCH]) for i in range(0, count, _BATCH)]
        expected = np.concatenate(
            [embedder.image_engine.run(batch, weight, bias)[0] for batch in batches]
        )
        times: list[list[tuple[float, float]]] = []
        for _ in range(rounds + 1):
            out = work / "embedded"
            shutil.rmtree(out, ignore_errors=True)
            alone = seconds_of(
                lambda: [embedder.image_engine.run(batch, weight, bias) for batch in batches]
            )
            decoding = seconds_of(decode)
            with (
                BulkJob.create(out, [archive], bundle, engine=engine, batch_size=_BATCH) as job,
                open_job_embedder(out) as own,
            ):
                (task,) = job.pending()
                bulk = seconds_of(partial(make_part, task, own, job.manifest))
                job.finish()
            times.append([alone, decoding, bulk])
    (batch,) = EmbeddingDirectory.open(out).batches(["universal"], rows=count)
    difference = float(np.abs(to_numpy(batch.column(0)) - expected).max())
    assert difference <= _TOLERANCE, f"the job differs from the engine by {difference}"
    walls = np.array([[wall for wall, _ in each] for each in times[1:]])
    used = np.array([[processor for _, processor in each] for each in times[1:]])
    engine_rate, decoding_rate, bulk_rate = count / np.median(walls, axis=0)
    engine_used, decoding_used, bulk_used = 1000 / count * np.median(used, axis=0)
    return Rates(
        case=name, count=count, engine=float(engine_rate), decoding=float(decoding_rate),
        bulk=float(bulk_rate), of_engine=float(np.median(walls[:, 0] / walls[:, 2])),
        processor=(float(engine_used), float(decoding_used), float(bulk_used)),
    )  # fmt: skip


def report(rates: Sequence[Rates], rounds: int, command: str) -> str:
    """Return the report in Markdown."""
    machine = describe_machine()
    shown = table(
        ["model, engine, pictures", "pictures", "engine alone/s", "decoding alone/s", "bulk/s",
         "bulk : engine", "processor ms: engine", "decoding", "bulk", "the rest"],
        [
            [each.case, f"{each.count:,}", f"{each.engine:,.0f}", f"{each.decoding:,.0f}",
             f"{each.bulk:,.0f}", f"{each.of_engine:.2f}",
             *(f"{ms:.3f}" for ms in each.processor),
             f"{each.processor[2] - each.processor[0] - each.processor[1]:.3f}"]
            for each in rates
        ],
    )  # fmt: skip
    return f"""# Bulk embedding beside the engine alone

Made with `{command}` at {describe_commit()} on {machine["processor"]},
{machine["cores"]} cores, {machine["memory"]}. Batches of {_BATCH}. Medians of {rounds} rounds in
which all took turns, after one of warm-up.

{shown}

- **Engine alone** runs on pixels in memory. **Decoding alone** takes JPEGs from memory with all
  threads. **Bulk** reads a tar archive, decodes, embeds, and writes and syncs a Parquet part.
- **Processor** time is that of all threads, for one picture. On a CPU, decoding and the engine
  share the cores, so that the ratio follows from it. **The rest** is reading the archive, writing
  the part, and waiting.
"""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="A larger model, such as ViT-B-32.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Path of the report, without its suffix.")
    arguments = parser.parse_args()
    if arguments.bundle is not None and not arguments.bundle.is_dir():
        raise InvalidInputError(f"{arguments.bundle}: expected a bundle, found none")
    small = [data for i, data in thumbnails(0, 5_008) if (i + 1) % EVERY][:4_800]
    cases = [("demo, fp32, 56×56", (demo_bundle(), "onnx/cpu/fp32"), small)]
    if arguments.bundle is not None:
        for side in ((224, 224), (640, 480)):
            pictures = synthetic_jpegs(320, side)
            cases.append(
                (f"ViT-B/32, int8, {side[0]}×{side[1]}", (arguments.bundle, "onnx/cpu/int8"),
                 pictures)
            )  # fmt: skip
    rates = []
    with tempfile.TemporaryDirectory() as work:
        for name, model, pictures in cases:
            rates.append(measure(name, model, pictures, arguments.rounds, Path(work)))
            print(rates[-1], flush=True)
    text = report(rates, arguments.rounds, "make bench-bulk")
    print(text)
    print(json.dumps([asdict(each) for each in rates]))
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
