"""Nothing leaves the machine: no look-up, no connection to another one, no file of telemetry."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from PIL import Image

from crl_sdk._telemetry import SWITCHES, switch_off_telemetry

TIMEOUT = 300

_PEER = re.compile(
    r'connect\(\d+, \{sa_family=AF_INET6?, .*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"'
)

COMMANDS = {
    "embed": ["embed", "a.png", "--criteria", "color", "--out", "x.npz"],
    "basis create": ["basis", "create", "size", "--text", "small", "--text", "large"],
    "generate": ["basis", "create", "color", "--answers", "2", "--dry-run"],
    "cluster": ["cluster", ".", "--criterion", "color", "-k", "2"],
    "doctor": ["doctor"],
    "serve": ["serve", "--address", "127.0.0.1:0"],
}


def test_the_switches_leave_what_the_user_has_set():
    environment = {"DO_NOT_TRACK": "0"}
    switch_off_telemetry(environment)
    assert environment == {**SWITCHES, "DO_NOT_TRACK": "0"}


def test_importing_the_package_switches_telemetry_off():
    code = "import crl_sdk, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=clean,
        capture_output=True,
        check=False,
        text=True,
        timeout=TIMEOUT,
    )
    assert said.stdout.strip() == "1", said.stderr


def traced(command, folder, home):
    """Run a command of `crl` under strace, and return what it connected to."""
    environment = {n: v for n, v in os.environ.items() if n not in SWITCHES}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    strace = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", "trace"]
    with (folder / "stderr").open("w") as errors:
        run = subprocess.Popen(
            [*strace, sys.executable, "-m", "crl_sdk", *command],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        if command[0] == "serve":
            assert '"serving"' in run.stdout.readline(), (folder / "stderr").read_text()
            psutil.Process(run.pid).children()[0].terminate()  # the server, not strace
        run.communicate(timeout=TIMEOUT)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert run.returncode == 0, (folder / "stderr").read_text()
    return (folder / "trace").read_text()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_looks_up_or_connects_to_another_machine(name, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for file, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / file)
    if name in ("embed", "cluster"):
        texts = ["--text", "red", "--text", "green", "--text", "blue"]
        made = subprocess.run(
            [sys.executable, "-m", "crl_sdk", "basis", "create", "color", *texts],
            cwd=tmp_path, capture_output=True, check=False, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    trace = traced(COMMANDS[name], tmp_path, home)
    peers = {peer for peer in _PEER.findall(trace) if not peer.startswith("127.") and peer != "::1"}
    assert not peers, trace
    assert "nscd" not in trace  # a look-up through the system's name service
    left = [path for path in home.rglob("*") if path.is_file()]
    assert not [
        path for path in left if "onnxruntime" in str(path) or "DeveloperTools" in str(path)
    ]
