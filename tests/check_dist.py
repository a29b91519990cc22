"""Check what an sdist and a wheel contain: `python tests/check_dist.py SOURCE SDIST WHEEL`.

The version must be the newest one of CHANGELOG.md. The sdist must hold every file of the source
tree, so that it builds and tests as a clone does. The wheel must hold the packages that users
import, all their files, and nothing else.
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
import zipfile
from pathlib import Path

NOT_IN_SDIST = {".gitignore"}
PACKAGES = {"crl_sdk": "crl_sdk", "crl_export": "export"}
SUFFIXES = {".csv", ".gz", ".jinja", ".json", ".onnx", ".py", ".pyi", ".txt", ".typed"}


def bench_modules(source: Path) -> set[str]:
    """Return the modules of `benchmarks/` that commands import, directly or through others."""
    commands = source / "crl_sdk" / "cli"
    found, files = {"__init__"}, [*commands.glob("_bench*.py"), commands / "_tune.py"]
    while files:
        for node in ast.walk(ast.parse(files.pop().read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "crl_benchmarks."
            ):
                name = (node.module or "").removeprefix("crl_benchmarks.")
                if name not in found:
                    found.add(name)
                    files.append(source / "benchmarks" / f"{name}.py")
    return found


def main(source: Path, sdist: Path, wheel: Path) -> list[str]:
    """Return what is wrong, one line for each fault."""
    newest = re.search(r"^## (\S+)", (source / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version = newest[1] if newest else ""
    faults = [
        f"{path.name}: expected version {version!r}, the newest one of CHANGELOG.md"
        for path, name in (
            (sdist, f"crl_embeddings-{version}.tar.gz"),
            (wheel, f"crl_embeddings-{version}-py3-none-any.whl"),
        )
        if path.name != name
    ]
    tree = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    tree = {name for name in tree if "__pycache__" not in name and ".egg-info" not in name}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    faults += [f"sdist: {name} is missing" for name in sorted(tree - inside - NOT_IN_SDIST)]

    wanted = {f"crl_benchmarks/{name}.py" for name in bench_modules(source)}
    for package, folder in PACKAGES.items():
        inner = (n.removeprefix(f"{folder}/") for n in tree if n.startswith(f"{folder}/"))
        wanted |= {f"{package}/{name}" for name in inner}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing = {name for name in wanted - held if Path(name).suffix in SUFFIXES}
    faults += [f"wheel: {name} is missing" for name in sorted(missing)]
    faults += [f"wheel: {name} does not belong there" for name in sorted(held - wanted)]
    if not faults:
        print(f"{sdist.name}: {len(inside)} files, {sdist.stat().st_size} bytes")
        print(f"{wheel.name}: {len(held)} files, {wheel.stat().st_size} bytes")
    return faults


if __name__ == "__main__":
    found = main(*(Path(argument) for argument in sys.argv[1:]))
    sys.exit("\n".join(found) or None)
