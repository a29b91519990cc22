"""Virtual environments of the peers, made by pip under `build/peers/venvs`; each may fail alone."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_benchmarks.peers.records import Environment

OWN = "crl"
"""Name of the project's own environment."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into an environment.

    Attributes:
        name: of its directory.
        packages: what pip is told to install.
        told: packages whose versions are written down.
        seconds: that pip may take.
    """

    name: str
    packages: tuple[str, ...]
    told: tuple[str, ...]
    seconds: float = 480.0


_TORCH = ("torch==2.14.1", "torchvision==0.29.1")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "open-clip", (*_TORCH, "open_clip_torch"), ("open_clip_torch", "torch", "torchvision")
        ),
        Recipe("transformers", (*_TORCH, "transformers"), ("transformers", "torch", "torchvision")),
        Recipe("faster-clip", ("faster-clip", "numpy"), ("faster-clip",)),
        Recipe("onnxruntime", ("onnxruntime", "numpy", "pillow"), ("onnxruntime", "pillow")),
        Recipe("openvino", ("openvino", "nncf", "numpy", "pillow"), ("openvino", "nncf", "pillow")),
        Recipe(
            "pytriton",
            ("nvidia-pytriton", "onnxruntime", "numpy", "pillow"),
            ("nvidia-pytriton", "onnxruntime", "tritonclient", "pillow"),
        ),
        # aiohttp: without it the server refuses every picture, and no extra of it brings one
        Recipe(
            "infinity",
            ("infinity-emb[server,torch,vision]", "aiohttp"),
            ("infinity-emb", "torch", "transformers"),
        ),
        # its dependencies are not bounded from above: without these pip does not settle in minutes,
        # and what it settles on does not start (jina wants pydantic 1 and pkg_resources)
        Recipe(
            "clip-server",
            (
                "clip-server==0.8.3",
                "jina==3.33.1",
                "open-clip-torch==2.8.2",
                *_TORCH,
                "click<8.2",
                "fastapi<0.110",
                "grpcio-health-checking==1.48.2",
                "grpcio-reflection==1.48.2",
                "numpy<2",
                "opentelemetry-exporter-otlp==1.15.0",
                "opentelemetry-sdk<1.30",
                "protobuf==3.20.*",
                "pydantic<2",
                "setuptools<81",
            ),
            ("clip-server", "jina", "torch", "open-clip-torch"),
            seconds=120.0,
        ),
    )
}


def make_environment(recipe: Recipe, folder: Path, logs: Path) -> Environment:
    """Make an environment, unless it is there as the recipe has it.

    Args:
        recipe: of it.
        folder: of all environments.
        logs: takes what pip said.

    Returns:
        It, or why there is none.
    """
    place, stamp = folder / recipe.name, folder / recipe.name / "recipe.json"
    wanted = json.dumps({"packages": recipe.packages, "python": platform.python_version()})
    started = time.perf_counter()
    made = 0.0
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(place, ignore_errors=True)
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{recipe.name}.pip.log"
        base = getattr(sys, "_base_executable", sys.executable)
        with log.open("w") as said:
            why = _run([base, "-m", "venv", str(place)], 120.0, said.fileno())
            why = why or _run(
                [str(python_of(place)), "-m", "pip", "install", "--no-input", *recipe.packages],
                recipe.seconds,
                said.fileno(),
            )
        if why:
            lines = [each for each in log.read_text().splitlines() if each.startswith("ERROR")]
            return Environment(
                name=recipe.name,
                skipped=f"pip install {why}" + "".join(f"; {x}" for x in lines[:1]),
            )
        stamp.write_text(wanted)
        made = time.perf_counter() - started
    return Environment(
        name=recipe.name,
        python=platform.python_version(),
        versions=freeze(python_of(place), recipe.told),
        seconds=round(made, 1),
    )


def own_environment() -> Environment:
    """Tell of the environment that this runs in."""
    told = ("crl-sdk", "onnxruntime", "grpcio", "pillow", "numpy")
    return Environment(
        name=OWN,
        python=platform.python_version(),
        versions=freeze(Path(sys.executable), told),
    )


def python_of(place: Path) -> Path:
    """Give the interpreter of an environment."""
    return place / "bin" / "python"


def freeze(python: Path, told: Sequence[str]) -> dict[str, str]:
    """Give the versions of some packages of an environment; those that are not there are left out.

    Args:
        python: its interpreter.
        told: their names.
    """
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    known = {_same(each["name"]): each["version"] for each in listed}
    return {name: known[_same(name)] for name in told if _same(name) in known}


def _same(name: str) -> str:
    return name.lower().replace("_", "-")


def _run(command: Sequence[str], seconds: float, log: int) -> str:
    """Run a command with all its children for so long; give why it failed, or nothing."""
    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = running.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return f"failed ({code})" if code else ""
