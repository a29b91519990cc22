"""The example of `examples/` runs on a cluster as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_embed.py"


@pytest.mark.slow  # Ray Data starts an actor for each step of four pipelines
def test_the_example_embeds_a_folder(cluster, embedder, image_files, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in image_files:
        (pictures / path.name).write_bytes(path.read_bytes())
    (pictures / "bad.jpg").write_bytes(b"no picture")
    basis = tmp_path / "color.safetensors"
    embedder.create_basis("color", ["red", "green", "blue"], load=False).save(basis)
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), str(pictures), str(tmp_path / "out"),
         "--basis", str(basis), "--ray", cluster.address],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "10 rows" in ran.stdout and "bad.jpg: " in ran.stdout
    table = parquet.read_table(tmp_path / "out")
    assert set(table.column_names) == {"path", "universal", "color", "error"}
    assert table["color"].null_count == 1
