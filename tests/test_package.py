"""The package as a whole: public names, import cost, versions, and where imports may point."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import crl_sdk
from crl_sdk.errors import CrlError, MissingDependencyError

ROOT = Path(__file__).parents[1]


def test_public_names():
    assert crl_sdk.__all__ == [
        "AsyncClient",
        "Basis",
        "Client",
        "ClientOptions",
        "ClientSecurity",
        "CrlError",
        "Embedder",
        "Embeddings",
        "ImageLimits",
        "ModelBundle",
        "Projection",
        "__version__",
        "demo_bundle",
    ]
    for name in crl_sdk.__all__:
        assert getattr(crl_sdk, name) is not None
    assert dir(crl_sdk) == crl_sdk.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = crl_sdk.nonsense


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_imports_next_to_nothing():
    loaded = run_python("import sys, crl_sdk; print(*sorted(sys.modules))").split()
    heavy = {"numpy", "torch", "onnxruntime", "grpc", "PIL", "tokenizers", "msgspec", "typer"}
    assert heavy.isdisjoint(loaded)


def test_the_runtime_imports_no_torch():
    code = (
        "import sys, crl_sdk\n"
        "for name in crl_sdk.__all__: getattr(crl_sdk, name)\n"
        "import crl_sdk.engines._onnx, crl_sdk.cli\n"
        "print(*sorted(sys.modules))"
    )
    assert {"torch", "open_clip", "onnx"}.isdisjoint(run_python(code).split())


def test_a_missing_runtime_names_its_extra():
    code = (
        "import sys\n"
        "sys.modules['msgspec'] = None\n"
        "import crl_sdk\n"
        "try: crl_sdk.Embedder\n"
        "except crl_sdk.CrlError as error: print(error)"
    )
    assert "pip install 'crl-embeddings[cpu]'" in run_python(code)
    assert issubclass(MissingDependencyError, CrlError)


def test_missing_command_line_packages_name_their_extra():
    code = "import sys; sys.modules['typer'] = None; import crl_sdk.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install 'crl-embeddings[cpu]'" in done.stderr


def test_changelog_names_the_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == crl_sdk.__version__


def test_packages_are_all_mapped():
    """Every Python package of the tree is installed, under no generic name."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = set(config["packages"])
    found = set()
    for name, folder in config["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inside)))
    assert found == mapped
    assert {name.split(".")[0] for name in mapped} == {"crl_sdk", "crl_export", "crl_benchmarks"}
