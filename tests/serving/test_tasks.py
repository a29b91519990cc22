"""Tasks on embeddings from the client give the same results as in process."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk.tasks import FewShotClassifier, Index, cluster
from crl_sdk.tasks._retrieval import condition_captions

pytest.importorskip("sklearn")

COLOURS = ["red", "green", "blue"]


def test_tasks_through_the_client(client, embedder, image_files):
    client.create_basis("color", COLOURS)
    result = client.embed(image_files, ["color"])
    rows = result["color"]
    truth = [path.stem.split("-")[0] for path in image_files]

    found = cluster(rows, universal=result.universal)
    assert found.k == 3 and len(set(zip(found.labels.tolist(), truth, strict=True))) == 3
    made = FewShotClassifier().fit(rows[::2], truth[::2])
    assert made.predict(rows) == truth

    index = Index(result.conditional, universal=result.universal)
    nearest = index.nearest({"color": rows[:1]}, n=3).positions
    assert {truth[i] for i in nearest} == {truth[0]} and nearest[0] == 0
    condition = client.embed_text(condition_captions("a blue square"))
    np.testing.assert_allclose(
        condition, embedder.embed_text(condition_captions("a blue square")), atol=1e-5
    )
    hits = index.but_with(0, condition, scene="color", weight=0.0, n=3)
    assert truth[hits.positions[0]] == "blue"
