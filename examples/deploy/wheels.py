"""Lock files of the images, wheels for machines without a network, and their sizes.

    make deploy-locks                       # examples/deploy/locks/*.txt
    make wheelhouse EXTRAS=cpu,serve ARCH=aarch64 PYTHON_VERSION=3.12
    make wheelhouse-table                   # the table of docs/DEPLOY.md

uv resolves for the other machine: pip would evaluate the markers of packages for this one. Each
lock names one wheel and its SHA-256 for each machine that the image is for. All wheels are for
Linux with glibc 2.35 or later: Ubuntu 22.04, Debian 12, JetPack 6.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOCKS = Path(__file__).parent / "locks"
PAGE = ROOT / "docs/DEPLOY.md"
GLIBC = (2, 35)
ARCHITECTURES = ("x86_64", "aarch64")
PYTHONS = ("3.10", "3.11", "3.12")
MARKS = "<!-- from make wheelhouse-table -->", "<!-- end of what is from make wheelhouse-table -->"


@dataclass(frozen=True)
class Machine:
    """A processor architecture and a version of Python."""

    arch: str
    python: str

    def tags(self) -> list[Tag]:
        """Return the tags of wheels that install there, best first."""
        version = tuple(map(int, self.python.split(".")))
        platforms = self.platforms()
        interpreter = f"cp{version[0]}{version[1]}"
        return [
            *cpython_tags(version, platforms=platforms),
            *compatible_tags(version, interpreter, platforms),
        ]

    def platforms(self) -> list[str]:
        """Return the platforms of wheels, from the newest glibc to the oldest."""
        oldest = 5 if self.arch == "x86_64" else 17
        found = []
        for minor in range(GLIBC[1], oldest - 1, -1):
            found.append(f"manylinux_{GLIBC[0]}_{minor}_{self.arch}")
            if minor == 17:
                found.append(f"manylinux2014_{self.arch}")
        if self.arch == "x86_64":
            found += ["manylinux2010_x86_64", "manylinux1_x86_64"]
        return [*found, f"linux_{self.arch}"]


@dataclass(frozen=True)
class Image:
    """What an image installs, and the machines that it is for."""

    extras: tuple[str, ...]
    machines: tuple[Machine, ...]
    more: tuple[str, ...] = ()
    unpinned: tuple[str, ...] = ()  # packages whose version in constraints.txt does not fit


IMAGES = {
    "cpu": Image(("cpu", "serve"), (Machine("x86_64", "3.11"), Machine("aarch64", "3.11"))),
    "cuda": Image(("gpu", "serve"), (Machine("x86_64", "3.12"),)),
    "rtx": Image(("cpu", "serve", "tensorrt-rtx"), (Machine("x86_64", "3.11"),)),
    "jetpack6": Image(
        ("cpu", "serve"), (Machine("aarch64", "3.10"),), ("cuda-bindings>=12.6,<13", "onnx>=1.18"),
        ("cuda-bindings", "cuda-pathfinder"),
    ),
    "jetpack7": Image(
        ("cpu", "serve"), (Machine("aarch64", "3.12"),), ("cuda-bindings>=13,<14", "onnx>=1.18")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wheel:
    """A wheel of the registry. The size is in bytes, as the registry states it."""

    name: str
    version: str
    file: str
    size: int
    sha256: str


class NoWheels(Exception):
    """A combination cannot be installed from wheels alone. The message says which package."""


def resolve(
    machine: Machine,
    extras: Iterable[str],
    more: Sequence[str] = (),
    unpinned: Sequence[str] = (),
) -> list[Wheel]:
    """Return the wheels that extras of the SDK need on a machine, without the SDK's own.

    Args:
        machine: Machine to install on.
        extras: Extras of pyproject.toml.
        more: Further requirements.
        unpinned: Packages whose version in constraints.txt is ignored.

    Raises:
        NoWheels: If a package has no wheel for the machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.partition("==")[0] not in unpinned]
        constraints.write_text("\n".join(kept), encoding="utf-8")
        further = Path(folder, "more.in")
        further.write_text("\n".join(more), encoding="utf-8")
        lock = Path(folder, "pylock.toml")
        command = [
            str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet",
            "--no-config", "--no-header", "--only-binary", ":all:", "--format", "pylock.toml",
            "--python-version", machine.python, "--python-platform",
            f"{machine.arch}-manylinux_{GLIBC[0]}_{GLIBC[1]}", "--constraint", str(constraints),
            "--output-file", str(lock), str(ROOT / "pyproject.toml"), str(further),
            *(word for extra in extras for word in ("--extra", extra)),
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise NoWheels(ran.stderr.strip())
        packages = tomllib.loads(lock.read_text(encoding="utf-8")).get("packages", [])
    return [best_wheel(package, machine) for package in packages]


def best_wheel(package: dict, machine: Machine) -> Wheel:
    """Return the wheel of a package that pip would choose on a machine."""
    order = {tag: place for place, tag in enumerate(machine.tags())}
    found = []
    for each in package.get("wheels", []):
        file = each.get("name") or each["url"].rpartition("/")[2]
        places = [order[tag] for tag in parse_wheel_filename(file)[3] if tag in order]
        if places:
            found.append((min(places), file, each))
    if not found:
        raise NoWheels(
            f"{package['name']} {package['version']} has no wheel for Python {machine.python} on "
            f"{machine.arch}"
        )
    _, file, each = min(found, key=lambda one: one[:2])
    return Wheel(package["name"], package["version"], file, each["size"], each["hashes"]["sha256"])


def write_lock(name: str) -> None:
    """Write the lock file of an image."""
    image = IMAGES[name]
    found = {
        machine: {
            wheel.name: wheel
            for wheel in resolve(machine, image.extras, image.more, image.unpinned)
        }
        for machine in image.machines
    }
    lines = [
        f"# {name}: the extras {', '.join(image.extras)}"
        + "".join(f", {each}" for each in image.more),
        "# " + ", ".join(f"Python {m.python} on {m.arch}" for m in image.machines)
        + ". Made by `make deploy-locks`.",
    ]  # fmt: skip
    for package in sorted(set().union(*found.values())):
        wheels = {m: of[package] for m, of in found.items() if package in of}
        versions = {wheel.version for wheel in wheels.values()}
        for version in sorted(versions):
            those = {m: wheel for m, wheel in wheels.items() if wheel.version == version}
            marker = ""
            if len(those) < len(image.machines):
                (machine,) = those
                marker = f' ; platform_machine == "{machine.arch}"'
            hashes = sorted({f"--hash=sha256:{wheel.sha256}" for wheel in those.values()})
            lines.append(" \\\n    ".join([f"{package}=={version}{marker}", *hashes]))
    (LOCKS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{name}: {len(lines) - 2} packages")


def build_wheel(target: Path) -> Path:
    """Build the wheel of the SDK from the files that git knows, and return its path.

    Older wheels of the SDK in the directory are removed: a Dockerfile copies all that are there.
    """
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("crl_embeddings-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others",
             "--exclude-standard"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                copied = Path(folder, name)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copied)
        run_pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), folder)
    (wheel,) = target.glob("crl_embeddings-*.whl")
    return wheel


def download(machine: Machine, extras: Sequence[str], target: Path) -> None:
    """Download the wheels that extras need on a machine, and build the SDK's own beside them."""
    wheels = resolve(machine, extras)
    target.mkdir(parents=True, exist_ok=True)
    fetch(machine, wheels, target)
    own = build_wheel(target)
    total = sum((target / wheel.file).stat().st_size for wheel in wheels) + own.stat().st_size
    print(f"{len(wheels) + 1} wheels, {total / 1e6:.1f} MB, in {target}")
    wanted = f"[{','.join(extras)}]" if extras else ""
    print(
        f"On a machine with Python {machine.python} on {machine.arch}:\n  pip install --no-index "
        f"--find-links={target.name} 'crl-embeddings{wanted}'"
    )


def fetch(machine: Machine, wheels: Sequence[Wheel], target: Path) -> None:
    """Download wheels that are not there, with their digests checked.

    Raises:
        SystemExit: If pip cannot, or a file has another size than the registry states.
    """
    missing = [wheel for wheel in wheels if not (target / wheel.file).exists()]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            lock = Path(folder, "lock.txt")
            lock.write_text(
                "".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in missing)
            )
            short = machine.python.replace(".", "")
            run_pip(
                "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:",
                "--implementation", "cp", "--python-version", machine.python,
                *("--abi", f"cp{short}", "--abi", "abi3", "--abi", "none"),
                *(word for name in machine.platforms() for word in ("--platform", name)),
                "--dest", str(target), "--requirement", str(lock),
            )  # fmt: skip
    for wheel in wheels:
        size = (target / wheel.file).stat().st_size
        if size != wheel.size:
            raise SystemExit(f"{wheel.file}: expected {wheel.size} bytes, got {size}")


def run_pip(*words: str) -> None:
    """Run pip, and end with its status if it fails."""
    ran = subprocess.run([sys.executable, "-m", "pip", *words], check=False)
    if ran.returncode:
        raise SystemExit(ran.returncode)


ROWS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("the client, without extras", (), ()),
    ("`cpu,serve`", ("cpu", "serve"), ()),
    ("`tasks` adds", ("cpu", "serve", "tasks"), ("cpu", "serve")),
    ("`generate-wheels` adds", ("cpu", "serve", "generate-wheels"), ("cpu", "serve")),
    ("`generate-endpoint` adds", ("cpu", "serve", "generate-endpoint"), ("cpu", "serve")),
    ("`generate` adds", ("cpu", "serve", "generate"), ("cpu", "serve")),
    ("`openvino` adds", ("cpu", "serve", "openvino"), ("cpu", "serve")),
    ("`parquet` adds", ("cpu", "serve", "parquet"), ("cpu", "serve")),
    ("`otel` adds", ("cpu", "serve", "otel"), ("cpu", "serve")),
    ("`export` adds", ("cpu", "serve", "export"), ("cpu", "serve")),
    ("`tensorrt-rtx` adds", ("cpu", "serve", "tensorrt-rtx"), ("cpu", "serve")),
    ("`gpu,serve`", ("gpu", "serve"), ()),
)
"""Rows of the table: name, extras, and the extras whose size is taken off."""


def write_table(page: Path) -> None:
    """Write sizes by extra, architecture and Python between the marks of a page."""
    machines = [Machine(arch, python) for arch in ARCHITECTURES for python in PYTHONS]
    lines = [
        "| MB of wheels | " + " | ".join(f"{m.arch} {m.python}" for m in machines) + " |",
        "|---|" + "---|" * len(machines),
    ]
    problems: dict[str, set[str]] = {}
    for name, extras, without in ROWS:
        cells = []
        for machine in machines:
            try:
                wheels = set(resolve(machine, extras))
                size = sum(w.size for w in wheels) - sum(w.size for w in resolve(machine, without)
                                                         if without)  # fmt: skip
            except NoWheels as error:
                cells.append("none")
                problems.setdefault(name, set()).add(f"{machine}: {error}")
                continue
            cells.append(f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:,.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    for name, found in problems.items():
        for what in sorted(found):
            print(f"{name}: {what}\n", file=sys.stderr)
    text = page.read_text(encoding="utf-8")
    first, last = map(re.escape, MARKS)
    table = "\n".join(["", "", *lines, "", ""])
    made, count = re.subn(f"(?<={first}).*?(?={last})", lambda _: table, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: expected the marks {MARKS[0]} and {MARKS[1]} once")
    page.write_text(made, encoding="utf-8")


def main() -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("build", help="build the wheel of the SDK")
    own.add_argument("--to", type=Path, default=ROOT / "dist")
    locks = commands.add_parser("lock", help="write the lock files of the images")
    locks.add_argument("images", nargs="*", default=list(IMAGES))
    wheelhouse = commands.add_parser("download", help="download wheels for another machine")
    wheelhouse.add_argument("--extras", default="cpu,serve")
    wheelhouse.add_argument("--arch", choices=ARCHITECTURES, default=os.uname().machine)
    wheelhouse.add_argument("--python", default="3.12")
    wheelhouse.add_argument("--to", type=Path, default=ROOT / "build/wheelhouse")
    table = commands.add_parser("table", help="write the table of sizes")
    table.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    try:
        if options.command == "build":
            print(build_wheel(options.to))
        elif options.command == "lock":
            for name in options.images:
                write_lock(name)
        elif options.command == "download":
            extras = [extra for extra in options.extras.split(",") if extra]
            download(Machine(options.arch, options.python), extras, options.to)
        else:
            write_table(options.page)
    except NoWheels as error:
        print(f"there is no set of wheels for this machine:\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
