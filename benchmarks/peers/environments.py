"""Virtual environments of the peers, created by pip under `build/peers/venvs`.

If one cannot be created, the others are measured all the same.
"""

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
class EnvironmentSpec:
    """Content of an environment.

    Attributes:
        name: Name of its directory.
        packages: Requirements to install with pip.
        reported: Packages whose versions go into the report.
        seconds: Time limit of pip.
    """

    name: str
    packages: tuple[str, ...]
    reported: tuple[str, ...]
    seconds: float = 480.0


_TORCH = ("torch==2.14.1", "torchvision==0.29.1")

ENVIRONMENTS = {
    spec.name: spec
    for spec in (
        EnvironmentSpec(
            "open-clip", (*_TORCH, "open_clip_torch"), ("open_clip_torch", "torch", "torchvision")
        ),
        EnvironmentSpec(
            "transformers", (*_TORCH, "transformers"), ("transformers", "torch", "torchvision")
        ),
        EnvironmentSpec("faster-clip", ("faster-clip", "numpy"), ("faster-clip",)),
        EnvironmentSpec(
            "onnxruntime", ("onnxruntime", "numpy", "pillow"), ("onnxruntime", "pillow")
        ),
        EnvironmentSpec(
            "openvino", ("openvino", "nncf", "numpy", "pillow"), ("openvino", "nncf", "pillow")
        ),
        EnvironmentSpec(
            "pytriton",
            ("nvidia-pytriton", "onnxruntime", "numpy", "pillow"),
            ("nvidia-pytriton", "onnxruntime", "tritonclient", "pillow"),
        ),
        # the server needs aiohttp for every image, and none of its extras installs it
        EnvironmentSpec(
            "infinity",
            ("infinity-emb[server,torch,vision]", "aiohttp"),
            ("infinity-emb", "torch", "transformers"),
        ),
        # clip-server sets no upper bounds. Without these bounds pip searches for minutes, and the
        # result does not start: jina needs pydantic 1 and pkg_resources.
        EnvironmentSpec(
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


def make_environment(spec: EnvironmentSpec, folder: Path, logs: Path) -> Environment:
    """Create an environment, unless it exists with the same content.

    Args:
        spec: Content of the environment.
        folder: Directory of all environments.
        logs: Directory for the output of pip.

    Returns:
        The environment, or the reason why it could not be created.
    """
    place, stamp = folder / spec.name, folder / spec.name / "environment.json"
    wanted = json.dumps({"packages": spec.packages, "python": platform.python_version()})
    started = time.perf_counter()
    made = 0.0
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(place, ignore_errors=True)
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{spec.name}.pip.log"
        base = getattr(sys, "_base_executable", sys.executable)
        with log.open("w") as said:
            why = _run([base, "-m", "venv", str(place)], 120.0, said.fileno())
            why = why or _run(
                [str(interpreter(place)), "-m", "pip", "install", "--no-input", *spec.packages],
                spec.seconds,
                said.fileno(),
            )
        if why:
            lines = [each for each in log.read_text().splitlines() if each.startswith("ERROR")]
            return Environment(
                name=spec.name,
                skipped=f"pip install {why}" + "".join(f"; {x}" for x in lines[:1]),
            )
        stamp.write_text(wanted)
        made = time.perf_counter() - started
    return Environment(
        name=spec.name,
        python=platform.python_version(),
        versions=freeze(interpreter(place), spec.reported),
        seconds=round(made, 1),
    )


def own_environment() -> Environment:
    """Return the environment that this process runs in."""
    reported = ("crl-embeddings", "onnxruntime", "grpcio", "pillow", "numpy")
    return Environment(
        name=OWN,
        python=platform.python_version(),
        versions=freeze(Path(sys.executable), reported),
    )


def interpreter(place: Path) -> Path:
    """Return the path of the interpreter of an environment."""
    return place / "bin" / "python"


def freeze(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed in an environment.

    Args:
        python: Interpreter of the environment.
        packages: Names of the packages.

    Returns:
        Version by name.
    """
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    known = {_same(each["name"]): each["version"] for each in listed}
    return {name: known[_same(name)] for name in packages if _same(name) in known}


def _same(name: str) -> str:
    return name.lower().replace("_", "-")


def _run(command: Sequence[str], seconds: float, log: int) -> str:
    """Run a command with a time limit; return why it failed, or an empty string."""
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
