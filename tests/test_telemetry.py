"""Nothing leaves the machine: no look-up, no connection to another one, no file of telemetry."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import open_clip
import psutil
import pytest
from PIL import Image
from safetensors.torch import save_file

from crl_sdk._telemetry import SWITCHES, switch_off_telemetry

TIMEOUT = 300

_PEER = re.compile(
    r"\{sa_family=AF_INET6?, sin6?_port=htons\((\d+)\), .*?"
    r'(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"'
)

_EMBED = ["embed", "a.png", "--criteria", "color", "--out", "x.npz"]

COMMANDS = {
    "embed": _EMBED,
    "embed with OpenVINO": [*_EMBED, "--engine", "openvino/cpu/fp32"],
    "export": ["export", "model", "--out", "bundle"],
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


def test_onnx_runtime_imported_first_is_said():
    # the real one would report
    code = "import sys; sys.modules['onnxruntime'] = sys; import crl_sdk"
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    for given, warned in ((clean, True), ({**clean, "ORT_DISABLE_TELEMETRY": "1"}, False)):
        said = subprocess.run(
            [sys.executable, "-c", code], env=given,
            capture_output=True, check=False, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert ("onnxruntime was imported before crl_sdk" in said.stderr) is warned


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


def others(trace):
    """Return the peers of a trace on other machines, and name servers wherever they are."""
    return {
        peer
        for port, peer in _PEER.findall(trace)
        if port == "53" or not (peer.startswith("127.") or peer in ("::1", "::ffff:127.0.0.1"))
    }


def test_peers_are_found_in_a_trace():
    trace = (
        '1 connect(8, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.11")}, 16'
        ') = 0\n2 connect(5, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("1.2.3.4")'
        "}, 16 <unfinished ...>\n"
        "3 sendto(5, x, 1, 0, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), "
        'inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = 1\n'
        '4 connect(8, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("127.0.0.1")}, 1)\n'
        '5 connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1\n'
    )
    assert others(trace) == {"127.0.0.11", "1.2.3.4", "2001:db8::1"}


def write_checkpoint(directory):
    """Write a tiny open_clip model with random weights."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    save_file(open_clip.CLIP(**config).state_dict(), directory / "open_clip_model.safetensors")


def traced(command, folder, home):
    """Run a command of `crl` under strace, and return what it connected to."""
    environment = {n: v for n, v in os.environ.items() if n not in SWITCHES}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    strace = ["strace", "-f", "-qq", "-e", calls, "-o", "trace"]
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
    if name == "export":
        write_checkpoint(tmp_path / "model")
    if COMMANDS[name][0] in ("embed", "cluster"):
        texts = ["--text", "red", "--text", "green", "--text", "blue"]
        made = subprocess.run(
            [sys.executable, "-m", "crl_sdk", "basis", "create", "color", *texts],
            cwd=tmp_path, capture_output=True, check=False, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    trace = traced(COMMANDS[name], tmp_path, home)
    assert others(trace) == set()
    left = [path for path in home.rglob("*") if path.is_file()]
    assert not [
        path for path in left if "onnxruntime" in str(path) or "DeveloperTools" in str(path)
    ]
