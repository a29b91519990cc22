"""The samples of CONTRIBUTING.md work in the modules that they are meant for."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import numpy as np
from pages import ROOT, blocks

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.basis import _methods
from crl_sdk.cli import _basis as basis_command
from crl_sdk.client import _client
from crl_sdk.engines import _openvino
from crl_sdk.engines._hardware import Hardware

SAMPLES = [block.text for block in blocks(ROOT / "CONTRIBUTING.md", "python")]


def run_sample(words: str, module: ModuleType) -> dict[str, Any]:
    """Run the sample that contains some words with the names of a module; return all names."""
    (sample,) = [text for text in SAMPLES if words in text]
    names = dict(vars(module))
    exec(
        compile(sample, "CONTRIBUTING.md", "exec"), names
    )  # annotations stay text, as in this file
    return names


def test_the_method():
    names = run_sample("def whitened", _methods)
    (record,) = [text for text in SAMPLES if text.startswith("ProjectionMethod(")]
    texts = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    weight = eval(record, names).function(_methods.MethodInputs(texts))
    np.testing.assert_allclose(np.square((texts - texts.mean(axis=0)) @ weight).sum(axis=0), 1)


def test_the_engine():
    family = run_sample("REFERENCE = ", _openvino)["REFERENCE"]
    hardware = Hardware(features=(), gpus=(), cuda="none")
    (candidate,) = family.list_candidates(ModelBundle.open(demo_bundle()), hardware)
    assert str(candidate.name) == "reference/cpu/fp32" and not candidate.automatic


def test_the_command(capsys):
    names = run_sample("def texts", basis_command)
    file = ROOT / "tests/basis/golden/basis.safetensors"
    names["texts"](file, as_json=False)
    assert capsys.readouterr().out.splitlines() == list(names["Basis"].load(file).texts)


def test_the_rpc():
    names = run_sample("async def rename_basis", _client)
    assert inspect.iscoroutinefunction(names["rename_basis"])
    assert names["_blocking"](names["rename_basis"]).__qualname__ == "Client.rename_basis"
