"""The package as a whole: public names, import cost, versions, and what is packaged.

`python tests/test_package.py --write` writes the public names to tests/public_api.txt.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from check_dist import bench_modules

import crl_sdk
from crl_sdk.errors import CrlError, MissingDependencyError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "crl_sdk"
PUBLIC_API = ROOT / "tests" / "public_api.txt"
WRITE = "python tests/test_package.py --write"

PUBLIC_MODULES = {"__init__", "__main__", "errors"}
NOT_FOR_USERS = {
    "crl_sdk.cli",  # it offers a command, not names
    "crl_sdk.integrations",  # its packages offer names
}
GENERATED = "pb"

NOT_SHIPPED = {"crl_benchmarks.gpu", "crl_benchmarks.peers", "crl_benchmarks.peers.workers"}


@dataclass(frozen=True)
class Exports:
    """What the `__init__.py` of a package says about its public names.

    Attributes:
        listed: `__all__`, in its order.
        at_once: Names that the package imports when it is imported itself, each with its module.
        typed: Names imported for type checkers, each with its module.
        lazy: Names in the table of `lazy_names`, each with its module.
    """

    listed: list[str]
    at_once: dict[str, str]
    typed: dict[str, str]
    lazy: dict[str, str]


def packages() -> list[str]:
    """Return the packages that have public names."""
    inits = [init.parent for init in SOURCE.rglob("__init__.py")]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in inits]
    return sorted({n for n in names if f".{GENERATED}" not in n} - NOT_FOR_USERS)


def read_exports(package: str) -> Exports:
    """Read an `__init__.py` without importing it."""
    init = ROOT / Path(*package.split(".")) / "__init__.py"
    listed: list[str] = []
    at_once: dict[str, str] = {}
    typed: dict[str, str] = {}
    lazy: dict[str, str] = {}
    tree = ast.parse(init.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                listed = ast.literal_eval(node.value)
            case ast.ImportFrom(module=str(module)) if module.startswith("crl_sdk"):
                names = at_once if node in tree.body else typed
                names |= {alias.asname or alias.name: module for alias in node.names}
            case ast.Call(func=ast.Name(id="lazy_names")):
                for module, names in ast.literal_eval(node.args[1]).items():
                    lazy |= dict.fromkeys(names, f"{package}.{module}")
            case _:
                pass
    del at_once["lazy_names"]
    return Exports(listed, at_once, typed, lazy)


def public_errors() -> list[str]:
    tree = ast.parse((SOURCE / "errors.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]


def public_api() -> str:
    """Return every public name of the SDK, one a line."""
    names = [f"{package}.{name}" for package in packages() for name in read_exports(package).listed]
    names += [f"crl_sdk.errors.{name}" for name in public_errors() if not name.startswith("_")]
    return "\n".join(sorted(names)) + "\n"


def has_docstring(module: str, name: str) -> bool:
    """Return whether a name has a docstring where it is defined; that of a variable is below it."""
    spec = import_module(module)
    assert spec.__file__ is not None
    body = ast.parse(Path(spec.__file__).read_text(encoding="utf-8")).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                return bool(ast.get_docstring(node))
            case ast.ImportFrom(module=str(source)) if name in {a.name for a in node.names}:
                return has_docstring(source, name)
            case (
                ast.AnnAssign(target=ast.Name(id=found)) | ast.Assign(targets=[ast.Name(id=found)])
            ) if found == name:
                return isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            case _:
                pass
    return read_home(module, name)


def read_home(module: str, name: str) -> bool:
    """Follow a name that a package imports on first use."""
    home = read_exports(module).lazy.get(name) if module in packages() else None
    return home is not None and has_docstring(home, name)


def test_the_public_api_is_the_one_on_record():
    recorded = set(PUBLIC_API.read_text(encoding="utf-8").split())
    found = set(public_api().split())
    assert found == recorded, (
        f"new public names: {sorted(found - recorded)}; gone: {sorted(recorded - found)}. "
        f"If users shall see this change, run {WRITE} and note it in CHANGELOG.md"
    )


@pytest.mark.parametrize("package", packages())
def test_a_package_names_its_public_names_once(package):
    exports = read_exports(package)
    assert exports.listed
    assert exports.typed == exports.lazy, "the imports for type checkers, and the lazy_names table"
    at_once = {name for name in exports.at_once if not name.startswith("_") or name.endswith("__")}
    assert {*at_once, *exports.lazy} == set(exports.listed), "what is imported, and __all__"
    module = import_module(package)
    assert module.__doc__ and dir(module) == sorted(exports.listed)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
    for name in exports.listed:
        assert getattr(module, name) is not None
        home = (exports.at_once | exports.lazy)[name]
        assert name == "__version__" or has_docstring(home, name), f"{name}: no docstring"


def test_modules_are_private_unless_they_are_meant_for_users():
    for path in SOURCE.rglob("*.py"):
        if GENERATED not in path.relative_to(SOURCE).parts:
            assert path.stem.startswith("_") or path.stem in PUBLIC_MODULES, path


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


def test_the_wheel_has_what_crl_bench_imports():
    code = ast.parse((ROOT / "tools" / "wheel_contents.py").read_text())
    (shipped,) = (node.value for node in code.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(shipped) == bench_modules(ROOT)


def test_packages_are_all_mapped():
    """Every Python package that ships is installed, under no generic name."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = set(config["packages"])
    found = set()
    for name, folder in config["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inside)))
    assert found - NOT_SHIPPED == mapped
    assert {name.split(".")[0] for name in mapped} == {"crl_sdk", "crl_export", "crl_benchmarks"}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {WRITE}")
    PUBLIC_API.write_text(public_api(), encoding="utf-8")
