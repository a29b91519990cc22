"""`crl serve` as a process: it prints its address, answers, drains on SIGTERM and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import trustme
import typer
from pages import ROOT

from crl_sdk import Client
from crl_sdk.basis import BasisDirectory
from crl_sdk.cli import app
from crl_sdk.cli._local_server import LocalServer, parse_ready_line
from crl_sdk.client import ClientOptions
from crl_sdk.errors import ServiceError


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:crl.sock"])
def test_it_serves_and_drains(crl_serve, tmp_path, image_files, address):
    process, listening = crl_serve("--address", address)
    if address.startswith("unix:"):
        listening = f"unix:{tmp_path / 'crl.sock'}"
    with Client(listening) as client:
        client.create_basis("color", ["red", "green", "blue"])
        rows = client.embed(image_files, criteria=["color"])["color"]
    assert rows.shape == (9, 2) and len(BasisDirectory(tmp_path / "bases").files("color")) == 1
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert stdout == ""  # the ready line was the only one
    assert process.returncode == 0 and "draining" in stderr and "stopped" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "localhost"], "do you mean localhost:50051?"),  # gRPC takes port 443
        (["--address", "::1"], "do you mean [::1]:50051?"),
        (["--address", "127.0.0.1:99999"], "got '127.0.0.1:99999'"),  # gRPC takes the rest
        (["--address", "203.0.113.7:0"], "cannot listen there (Cannot assign requested address)"),
        (["--address", "unix:nowhere/crl.sock"], "cannot listen there (No such file or directory)"),
        (["--address", "unix:" + 200 * "x"], "cannot listen there (AF_UNIX path too long)"),
        (["--metrics", "127.0.0.1:99999"], "got '127.0.0.1:99999'"),
        (["--metrics", "203.0.113.7:0"], "203.0.113.7:0: cannot serve metrics there"),
        (["--tls-cert", "cert.pem"], "--tls-key together"),
        (["--tokens", "none.toml"], "not a TOML file of tokens"),
        (["--bundle", "nowhere"], "nowhere"),
    ],
)
def test_it_ends_with_a_message_if_it_cannot_start(crl_serve, arguments, words):
    with pytest.raises(AssertionError, match=re.escape(words)) as caught:
        crl_serve("--address", "127.0.0.1:0", *arguments)
    assert "it ended with 1" in str(caught.value) and "Traceback" not in str(caught.value)


def test_options_come_from_the_line_the_environment_and_a_file(crl_serve, tmp_path):
    (tmp_path / "crl.toml").write_text(
        'address = "127.0.0.1:1"\nbases = "from-file"\nmax-queue = 70\naccess-log = true\n'
    )
    process, address = crl_serve(
        "--config", "crl.toml", "--address", "127.0.0.1:0", CRL_SERVE_MAX_QUEUE="90",
        CRL_SERVE_ADDRESS="nonsense",
    )  # fmt: skip
    with Client(address) as client:
        assert client.model().max_images == 90  # the environment, not the file
        client.create_basis("color", ["red", "blue"])
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert "BasisService/PutBasis OK" in stderr
    assert len(BasisDirectory(tmp_path / "from-file").files("color")) == 1


def test_the_command_line_and_the_environment_turn_off_what_the_file_turns_on(crl_serve, tmp_path):
    (tmp_path / "crl.toml").write_text("access-log = true\nshared-memory = true\ngenerate = true\n")
    process, address = crl_serve(
        "--address", "127.0.0.1:0", "--no-access-log", "--no-generate",
        CRL_SERVE_CONFIG="crl.toml", CRL_SERVE_SHARED_MEMORY="false",
    )  # fmt: skip
    with Client(address) as client:
        client.model()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert "GetModel" not in stderr


def test_the_table_of_options_is_complete():
    """Each option, with its environment variable, as `crl serve` reads them."""
    command = typer.main.get_command(app).commands["serve"]
    rows = {
        f"| `{name}` | `{option.envvar or 'CRL_SERVE_' + option.name.upper()}` |"
        for option in command.params
        for name in option.opts
        if name.startswith("--") and name != "--help"
    }
    page = (ROOT / "docs/SERVICE.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `--.*?\|.*?\|", page, re.MULTILINE)
    assert len(table) == len(rows) and set(table) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-bach = 3", "no option 'max-bach'; do you mean 'max-batch'?"),
        ("max_batch = 3", "do you mean 'max-batch'?"),
        ("config = 'x'", "no option 'config'"),
        ("max-batch = [3]", "max-batch is [3]: expected `int`, got `array`"),
        ("max-batch = 'many'", "max-batch is 'many': expected `int`, got `str`"),
        ("max-batch = '64'", "max-batch is '64': expected `int`"),
        ("max-batch = true", "max-batch is True: expected `int`, got `bool`"),
        ("max-batch = 2.0", "max-batch is 2.0: expected `int`, got `float`"),
        ("max-batch = 1979-05-27", "expected `int`, got `date`"),
        ("threads = '2'", "threads is '2': expected `int`"),
        ("access-log = 1", "access-log is 1: expected `bool`, got `int`"),
        ("address = 50051", "address is 50051: expected `str`, got `int`"),
        ("tls-cert = 3", "tls-cert is 3: expected `str`"),
        ("metrics = false", "metrics is False: expected `str`"),
        ("max-batch = 0", "crl.toml: max-batch is 0: "),
        ("log-format = 'xml'", "crl.toml: log-format is 'xml': "),
        ("no-access-log = true", "do you mean 'access-log'?"),
        ("max-batch 3", "not a TOML file"),
        ("[serve]\nmax-batch = 3", "no option 'serve'"),
    ],
)
def test_a_bad_configuration_names_the_key(crl_serve, tmp_path, text, words):
    (tmp_path / "crl.toml").write_text(text)
    with pytest.raises(AssertionError, match=re.escape(words)) as caught:
        crl_serve("--address", "127.0.0.1:0", "--config", "crl.toml")
    assert "Traceback" not in str(caught.value)


def test_each_line_of_the_json_log_is_json(crl_serve, tmp_path):
    """Also what the C core of gRPC writes about a TLS handshake that fails, if it is asked to."""
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    issued.private_key_pem.write_to_path(tmp_path / "server.key")
    tls = ("--tls-cert", "server.pem", "--tls-key", "server.key")
    for verbosity in ({}, {"GRPC_VERBOSITY": "INFO"}):
        process, address = crl_serve(
            "--address", "127.0.0.1:0", "--log-format", "json", *tls, **verbosity
        )
        with (
            Client(address, ClientOptions(timeout=2, retries=0)) as client,
            pytest.raises(ServiceError),
        ):
            client.model()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        lines = [json.loads(line) for line in stderr.splitlines()]
        assert [line["level"] for line in lines].count("info") >= 3
        assert any("Handshake failed" in line["message"] for line in lines) == bool(verbosity)
    with pytest.raises(AssertionError) as caught:
        crl_serve("--address", "nonsense", "--log-format", "json")
    last = str(caught.value).removeprefix("it ended with 1: ")
    assert "do you mean nonsense:50051?" in json.loads(last)["message"]


def test_a_socket_belongs_to_one_server(crl_serve, tmp_path):
    """gRPC would give the path to the second server, and nobody could reach the first."""
    address = f"unix:{tmp_path / 'crl.sock'}"
    first, _ = crl_serve("--address", address)
    with pytest.raises(AssertionError, match=r"crl\.sock: cannot listen there.*another server"):
        crl_serve("--address", address, "--bases", "others")
    first.kill()
    first.wait()
    assert (tmp_path / "crl.sock").exists()
    crl_serve("--address", address)
    with Client(address) as client:
        assert client.model().name == "crl-demo"


@pytest.mark.parametrize("stdout", ["closed pipe", "full disk"])
def test_it_serves_on_if_nobody_reads_its_ready_line(tmp_path, stdout):
    if stdout == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(
        [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    timer = threading.Timer(30, process.kill)  # ends the reading below
    timer.start()
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "the ready line could not be printed" in line:
                break
        (address,) = re.findall(r"serving .* on (\S+),", "".join(lines))
        with Client(address) as client:
            assert client.model().name == "crl-demo"
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
    assert process.returncode == 0 and "stopped" in rest
    assert "Traceback" not in "".join(lines) + rest


@pytest.mark.parametrize("noise", ["noise\n", "a form feed \f\n", "10 %\r20 %\r\n", "\u2028\x85\n"])
def test_the_ready_line_is_found_after_any_other_line(noise):
    ready = {"address": "h:1", "model": "m", "engine": "onnx/cpu/fp32", "metrics": None, "pid": 7}
    line = json.dumps({"event": "serving", **ready})
    assert parse_ready_line(f"{noise}{line}\n") == LocalServer(**ready)


def test_the_ready_line_is_found_among_other_output():
    ready = {"address": "h:1", "model": "m", "engine": "onnx/cpu/fp32", "metrics": None, "pid": 7}
    line = json.dumps({"event": "serving", **ready})
    assert parse_ready_line(f'noise\n{{"event": "other"}}\n3\n{line}') is None  # no line end yet
    assert parse_ready_line(f"noise\n{line}\nmore") == LocalServer(**ready)
