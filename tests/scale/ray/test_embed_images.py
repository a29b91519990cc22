"""`map_batches` with a pool of actors: the rows of the single process, a worker killed included."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from crl_sdk import demo_bundle
from crl_sdk.integrations.ray import EmbedImages, connect

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray, about itself


class Killed(EmbedImages):
    """Kills its own process once, in the middle of the job."""

    def __init__(self, *args, mark, **options):
        super().__init__(*args, **options)
        self._mark = mark

    def __call__(self, batch):
        if 40 in batch["id"] and not os.path.exists(self._mark):
            with open(self._mark, "x"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        batch["threads"] = np.full(
            len(batch["id"]),
            self.embedder.decode_pool._max_workers,  # type: ignore[attr-defined]
        )
        return super().__call__(batch)


def test_a_pool_gives_the_rows_of_one_process_although_a_worker_dies(
    cluster, embedder, image_files, tmp_path
):
    color = embedder.create_basis("color", ["red", "green", "blue"], load=False)
    data = [image_files[i % 9].read_bytes() if i % 10 else b"bad" for i in range(80)]
    with connect(cluster.address):
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items(
            [{"id": i, "image": each} for i, each in enumerate(data)], override_num_blocks=8
        )
        found = rows.map_batches(
            Killed,
            fn_constructor_args=(demo_bundle(), [color]),
            fn_constructor_kwargs={"engine": "onnx/cpu/fp32", "mark": str(tmp_path / "killed")},
            batch_size=10,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
        ).take_all()
    assert (tmp_path / "killed").exists()
    found.sort(key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(80))
    assert {row["threads"] for row in found} == {1}
    expected = embedder.embed(data, [color], batch_size=10, on_error="collect")
    for name, rows in {"universal": expected.universal, "color": expected["color"]}.items():
        assert np.array_equal(np.stack([row[name] for row in found]), rows, equal_nan=True)
    assert [row["error"] is None for row in found] == list(expected.ok)
