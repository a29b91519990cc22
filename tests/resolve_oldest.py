"""Resolve the dependencies for the oldest supported Python: `python tests/resolve_oldest.py`.

pip looks for wheels that install on that Python under the versions of constraints.txt, and
installs nothing. The interpreter itself need not be present. pip evaluates environment markers for
the Python it runs on, so this script evaluates them first. Therefore a dependency that a *package*
has only on the oldest Python is checked by its pin in constraints.txt, not by its requirer.

Not covered are llama-cpp-python, which has no wheels and is compiled where it is installed, and the
extras `gpu`, which excludes `cpu`, and `tensorrt`, whose libraries are not on PyPI. The extras
of `make test-scale` are left out too: constraints-scale.txt pins them for the Python of .venv. The
extra `ray` resolves for Python 3.10 without the pins of fastapi and starlette, which need 3.11.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMPILED = {"llama-cpp-python"}
LEFT_OUT = {"gpu", "tensorrt", "ray", "qdrant", "lancedb", "pgvector", "milvus"}


def main() -> int:
    """Resolve, and print what was found or what pip said."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.search(r"3\.\d+", project["requires-python"])
    assert oldest is not None
    python = oldest[0]
    pins = selected((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(), python)
    extras = [name for name in project["optional-dependencies"] if name not in LEFT_OUT]
    wanted = expanded(project, extras)
    chosen = [r for r in selected(wanted, python) if canonicalize_name(r.name) not in COMPILED]
    only_there = {
        canonicalize_name(pin.name)
        for pin in map(Requirement, lines(ROOT / "constraints.txt"))
        if pin.marker is not None and pin.marker.evaluate(environment(python))
    }
    chosen += [pin for pin in pins if canonicalize_name(pin.name) in only_there]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(map(str, pins)), encoding="utf-8")
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("\n".join(sorted({str(r) for r in chosen})), encoding="utf-8")
        report = Path(folder, "report.json")
        ran = subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--dry-run",
                "--ignore-installed", "--only-binary=:all:", f"--python-version={python}",
                f"--target={folder}", f"--report={report}", f"--constraint={constraints}",
                f"--requirement={requirements}",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            print(ran.stderr, file=sys.stderr)
            print(f"Python {python}: pip cannot resolve constraints.txt", file=sys.stderr)
            return 1
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {canonicalize_name(each["metadata"]["name"]) for each in found}
    if unpinned := sorted(names - {canonicalize_name(pin.name) for pin in pins}):
        print(f"Python {python}: not in constraints.txt: {', '.join(unpinned)}", file=sys.stderr)
        return 1
    versions = (f"{each['metadata']['name']} {each['metadata']['version']}" for each in found)
    print(f"Python {python}: {len(names)} packages resolve: {', '.join(sorted(versions))}")
    print(f"Extras: {', '.join(extras)}. Not covered: {', '.join(sorted(COMPILED | LEFT_OUT))}")
    return 0


def environment(python: str) -> dict[str, str]:
    """Return the marker environment of this platform with another Python."""
    return {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
        "extra": "",
    }


def lines(path: Path) -> list[str]:
    """Return the lines of a constraints file without comments."""
    stripped = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in stripped if line]


def selected(requirements: Iterable[str], python: str) -> list[Requirement]:
    """Return the requirements whose marker holds on a Python, without their markers."""
    chosen = []
    for line in requirements:
        if not (text := line.split("#")[0].strip()):
            continue
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            requirement.marker = None
            chosen.append(requirement)
    return chosen


def expanded(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """Return the requirements of the project with some extras, nested extras resolved."""
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                found += expanded(project, requirement.extras)
            else:
                found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
