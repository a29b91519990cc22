"""`crl demo` on a user's own images, with a server that must end with the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis._build import build_basis
from crl_sdk.cli import _demo as demo_module
from crl_sdk.cli._demo import demo
from crl_sdk.cli._local_server import local_server
from crl_sdk.cli._report_content import (
    describe_cluster_count,
    described_groups,
    labelled_groups,
)
from crl_sdk.errors import InvalidInputError, ServiceError
from crl_sdk.tasks import cluster
from support import generated_texts


@pytest.fixture
def folder(tmp_path, image_files) -> Path:
    """Return a directory with nine good images and a bad one."""
    for path in image_files:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path


def scripted(name, _model, embedder, prompt, kept, fresh):
    """Return a basis without asking the language model."""
    return embedder.create_basis(name, ["red", "green", "blue"], prompts=[prompt])


def test_a_users_own_images(folder, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "_generate_or_reuse", scripted)
    out = folder / "out"
    demo(
        images=folder, criteria="Colour", groups=3, prompt="{}", bundle=None, count=1500,
        directory=out, generate=True, fresh=False, llm=None, as_json=False,
    )  # fmt: skip
    said = capsys.readouterr()
    assert "broken.jpg: left out" in said.err.replace("\n", "")
    for name in ("red", "green", "blue"):
        assert f"{name} 3" in said.out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('role="img"') == 18 and page.count("data:image/jpeg") == 9  # encoded once
    assert "http" not in page and not (out / "report.png").exists()
    listed = subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout
    assert str(out) not in listed and "crl-bases-" not in listed  # no server is left behind


@pytest.mark.parametrize(
    ("images", "criteria", "message"),
    [("missing", "color", "expected a directory"), ("empty", "color", "no image files"),
     (None, "color", "together"), ("empty", "../x", "criterion")],
)  # fmt: skip
def test_what_it_cannot_group(tmp_path, images, criteria, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match=message):
        demo(
            images=tmp_path / images if images else None, criteria=criteria, groups=0,
            prompt="{}", bundle=None, count=100, directory=tmp_path / "out", generate=True,
            fresh=False, llm=None, as_json=False,
        )  # fmt: skip


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(ServiceError, match="ended with status 1"), local_server(
        tmp_path / "no-bundle", tmp_path / "log"
    ):  # fmt: skip
        pass


def test_the_servers_process_ends_with_the_block(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        local_server(demo_bundle(), tmp_path / "log") as server,
    ):
        assert server.engine == "onnx/cpu/fp32"
        raise KeyboardInterrupt
    port = server.address.rpartition(":")[2]
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    tried = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert tried.returncode != 0


def test_groups_are_named_by_labels_or_by_texts():
    rows = np.repeat(np.eye(3, dtype=np.float32), 6, axis=0)
    rows += np.random.default_rng(0).normal(0, 0.05, rows.shape).astype(np.float32)
    texts = np.eye(3, dtype=np.float32)
    basis = build_basis("color", ["red", "green", "blue"], lambda _: texts, fingerprint="f" * 64)
    found = cluster(rows, universal=rows, basis=basis)
    named, clusters = described_groups(found), found.labels
    assert {group.name for group in named} == {"red", "green", "blue"}
    assert "groups, 3, was chosen by silhouette: 100% of 10" in describe_cluster_count(
        found.choice, found.stability
    )
    labels = np.repeat(np.arange(3), 6)
    labels[0] = 1  # one label that does not fit
    groups = labelled_groups(clusters, labels, ["a", "b", "c"])
    assert [group.name for group in groups] == ["a", "b", "c"]
    assert groups[0].purity == pytest.approx(5 / 6) and groups[0].label_matches.count(False) == 1


@pytest.fixture
def drafted(monkeypatch) -> list[str]:
    """Replace the language model by three words; returns the list of criteria asked for."""
    asked: list[str] = []

    def generate(embedder, criterion, **_):
        asked.append(criterion)
        return generated_texts(criterion, ["red", "green", "blue"])

    monkeypatch.setattr(Embedder, "generate_texts", generate)
    return asked


def test_a_kept_basis_is_reused_only_for_the_same_command(tmp_path, drafted):
    with Embedder.open(demo_bundle()) as embedder:
        for prompt, fresh in (("{}", False), ("{}", False), ("a {}", False), ("{}", True)):
            basis = demo_module._generate_or_reuse(
                "colour", None, embedder, prompt, tmp_path, fresh
            )
            assert basis is not None and basis.texts
        for kept in tmp_path.iterdir():
            kept.write_bytes(b"damaged")
        assert (
            demo_module._generate_or_reuse("colour", None, embedder, "{}", tmp_path, False)
            is not None
        )
    assert len(drafted) == 4


def test_json_is_all_there_is_on_stdout(folder, drafted, capsys):
    demo(
        images=folder, criteria="Colour", groups=3, prompt="{}", bundle=None, count=1500,
        directory=folder / "out", generate=True, fresh=False, llm=None, as_json=True,
    )  # fmt: skip
    said = capsys.readouterr()
    assert drafted == ["colour"] and "red, green, blue" in said.err
    told = json.loads(said.out)
    assert told["images"] == 9 and "colour" in json.dumps(told)
