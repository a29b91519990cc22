"""Several workers at one address: bases of all, deaths, bad starts, and one page of metrics."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from crl_sdk import Client, ClientOptions, Embedder, demo_bundle
from crl_sdk._processors import Processors, share_processors
from crl_sdk.basis._build import build_basis
from crl_sdk.errors import BasisError, BasisExistsError, ServiceError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc._tensors import encode_tensor
from crl_sdk.serving import _supervisor
from crl_sdk.serving._bases import DirectoryBasisStore
from crl_sdk.serving._supervisor import Supervisor, reserve_port
from crl_sdk.serving._worker_metrics import WorkerMetrics
from support import basis_file, unseen_image, wait_until

PAGE = """# HELP crl_calls_total Calls that ended.
# TYPE crl_calls_total counter
crl_calls_total{code="OK",method="Embed"} 3.0
# HELP crl_calls_created Calls that ended.
# TYPE crl_calls_created gauge
crl_calls_created{code="OK",method="Embed"} 1.7e9
# HELP crl_batch_size Images of an engine run.
# TYPE crl_batch_size histogram
crl_batch_size_bucket{le="1.0"} 2.0
crl_batch_size_bucket{le="+Inf"} 3.0
crl_batch_size_count 3.0
crl_batch_size_sum 7.0
# HELP crl_queue_depth Images that wait.
# TYPE crl_queue_depth gauge
crl_queue_depth 5.0
"""


def samples(page):
    """Return the samples of a page, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def embed(channel):
    """Embed an image that no cache has seen."""
    image = embedding_pb2.Image(pixels=encode_tensor(unseen_image()))
    request = embedding_pb2.EmbedRequest(images=[image])
    return embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(request, timeout=30)


def read_metrics(process_output_address):
    url = f"http://{process_output_address}/metrics"
    return samples(urllib.request.urlopen(url, timeout=10).read().decode())


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def metrics_address():
    return free_address()


def workers_of(process):
    return [child.pid for child in psutil.Process(process.pid).children()]


def test_connections_are_spread_and_bases_are_those_of_all(
    crl_serve, image_files, metrics_address, tmp_path
):
    process, address = crl_serve(
        "--workers", 2, "--address", "127.0.0.1:0", "--metrics", metrics_address
    )
    assert len(workers_of(process)) == 2
    calls = 24
    for _ in range(calls):
        with grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            embed(channel)
    found = read_metrics(metrics_address)
    entries = [found["crl_cache_entries", ("worker", str(i))] for i in range(2)]
    assert sum(entries) == calls and min(entries) > 0  # one in 8 million fails by chance
    method = ("method", "/crl.v1.EmbeddingService/Embed")
    assert found["crl_calls_total", ("code", "OK"), method] == calls
    assert found["crl_batch_size_count",] >= calls
    clients = [Client(address) for _ in range(8)]
    try:
        info = clients[0].create_basis("color", ["red", "green", "blue"])
        for client in clients:  # whichever worker it has
            result = client.embed(image_files[:2], criteria=["color"])
            assert result.basis_sha256["color"] == info.sha256
        with pytest.raises(BasisExistsError):
            clients[1].create_basis("color", ["red", "blue"], replace=False)
        clients[2].delete_basis("color")
        wait_until(lambda: not any(client.bases() for client in clients))
    finally:
        for client in clients:
            client.close()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "") and "Traceback" not in stderr
    assert len(re.findall(r"worker [01]: stopped", stderr)) == 2
    assert stderr.count("no --bundle") == 1


def test_a_killed_worker_is_replaced_and_other_calls_go_on(crl_serve, metrics_address):
    process, address = crl_serve(
        "--workers", 2, "--address", "127.0.0.1:0", "--metrics", metrics_address,
        "--log-format", "json",
    )  # fmt: skip
    failures, done, stop = [], [], threading.Event()

    def work():
        with Client(address, ClientOptions(timeout=60)) as client:
            while not stop.is_set():
                try:
                    client.embed([unseen_image()])
                    done.append(time.monotonic())
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(done) > 20, 30)
        before = read_metrics(metrics_address)
        for victim in workers_of(process):  # both, one after the other
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda killed=killed: sum(when > killed for when in done) > 20, 30)
            wait_until(
                lambda: (
                    len(workers_of(process)) == 2
                    and [
                        v
                        for k, v in read_metrics(metrics_address).items()
                        if k[0] == "crl_worker_up"
                    ]
                    == [1, 1]
                ),
                30,
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    after = read_metrics(metrics_address)
    assert not failures  # the clients try again, and find the other worker
    for key, value in before.items():  # what dead workers had counted is kept
        if key[0].endswith(("_total", "_count", "_bucket", "_sum")):
            assert after[key] >= value
    assert [after["crl_worker_restarts_total", ("worker", str(i))] for i in range(2)] == [1, 1]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    lines = [json.loads(line) for line in stderr.splitlines()]  # each is an object
    assert {line.get("worker") for line in lines} == {None, 0, 1}
    assert sum("ended with signal SIGKILL" in line["message"] for line in lines) == 2
    assert process.returncode == 0


def test_workers_end_with_their_supervisor(crl_serve):
    process, _ = crl_serve("--workers", 2, "--address", "127.0.0.1:0")
    workers = workers_of(process)
    process.kill()
    process.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), 30)


def test_a_worker_that_cannot_start_again_ends_the_server(crl_serve, bundle_copy):
    process, _ = crl_serve("--workers", 2, "--address", "127.0.0.1:0", "--bundle", bundle_copy)
    bundle_copy.rename(bundle_copy.with_name("gone"))
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert "died 5 times in a row right after its start, with status 1 at last" in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "'--workers': Input should be greater than or equal to 1"),
        (["--address", "unix:crl.sock"], "several workers cannot share it"),
        (["--address", "203.0.113.7:0"], "cannot listen there (Cannot assign requested address)"),
        (["--metrics", "203.0.113.7:0"], "cannot serve metrics there"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--shared-bases", "nonsense://x"], "a directory or a URL that fsspec knows"),
        (["--tls-cert", "cert.pem"], "--tls-key together"),
    ],
)
def test_what_is_wrong_is_said_once(crl_serve, arguments, words):
    with pytest.raises(AssertionError, match=re.escape(words)) as caught:
        crl_serve("--address", "127.0.0.1:0", "--workers", "2", *arguments)
    assert str(caught.value).count(words) == 1 and "Traceback" not in str(caught.value)
    assert re.search("it ended with [12]:", str(caught.value))


def test_a_taken_port_is_refused_whoever_has_it(crl_serve):
    """Also if its owner shares it: two servers would answer each other's calls."""
    _, address = crl_serve("--workers", 2, "--address", "127.0.0.1:0")
    for workers in (1, 2):
        with pytest.raises(AssertionError, match="Address already in use"):
            crl_serve("--workers", workers, "--address", address, "--bases", "others")


def test_more_workers_than_processors_are_warned_of(crl_serve):
    count = len(os.sched_getaffinity(0)) + 1
    process, _ = crl_serve("--workers", count, "--address", "127.0.0.1:0")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert f"{count} workers of 1 threads on {count - 1} processors" in stderr


def test_workers_share_a_directory_that_no_other_server_gets(embedder, tmp_path):
    def store(poll):
        return DirectoryBasisStore(tmp_path, embedder.bundle.fingerprint, worker_poll_seconds=poll)

    def make(*texts):
        return build_basis(
            "mood", texts, embedder.embed_text, fingerprint=embedder.bundle.fingerprint
        )

    one, other, stranger = store(0.05), store(0.05), store(None)
    one.open()
    other.open()
    try:
        with pytest.raises(BasisError, match="another server owns it"):
            stranger.open()
        first = one.put(make("red", "blue"))[0]
        with pytest.raises(BasisExistsError):  # before the next look
            other.put(make("red", "green"), replace=False)
        wait_until(lambda: other.snapshot.get("mood", first).sha256 == first.sha256)
        assert other.put(make("red", "pink"))[1] is True
        file = basis_file(tmp_path, "mood")
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])  # damaged by hand: the basis that was read stays
        one._refresh()
        other._refresh()
        one.directory.rename(tmp_path / "away")  # so it does while the directory is away
        wait_until(lambda: one.watcher.problem and other.watcher.problem)
        assert "mood" in one.snapshot and "mood" in other.snapshot
        (tmp_path / "away").rename(one.directory)
        file.write_bytes(whole)
        wait_until(lambda: not (one.watcher.problem or other.watcher.problem))
        other.delete("mood")
        wait_until(lambda: not one.snapshot)
    finally:
        one.close()
        other.close()
    stranger.open()
    stranger.close()


@pytest.mark.parametrize(
    ("count", "allowed", "quota", "parts"),
    [(2, 4, None, [2, 2]), (2, 5, None, [3, 2]), (4, 2, None, [1, 1, 1, 1]), (2, 64, 3.5, [2, 2])],
)
def test_processors_are_divided(count, allowed, quota, parts):
    processors = Processors(machine=64, allowed=allowed, allowed_cores=allowed, quota=quota)
    try:
        for number in range(count):
            share_processors(number, count)
            assert processors.number == processors.cores == parts[number]
    finally:
        share_processors(0, 1)


def test_metrics_of_workers_are_summed_and_never_fall():
    metrics = WorkerMetrics()
    metrics.update(0, PAGE)
    metrics.update(1, PAGE)
    metrics.update(1, PAGE)  # a newer page of the same worker

    def read():
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for family in metrics.collect()
            for s in family.samples
        }

    calls = ("crl_calls_total", ("code", "OK"), ("method", "Embed"))
    assert read()[calls] == 6 and read()["crl_batch_size_sum",] == 14
    assert read()["crl_batch_size_bucket", ("le", "1.0")] == 4
    assert read()["crl_queue_depth", ("worker", "1")] == 5
    metrics.retire(1)
    assert read()[calls] == 6 and ("crl_queue_depth", ("worker", "1")) not in read()
    metrics.update(1, PAGE)
    assert read()[calls] == 9 and read()["crl_batch_size_count",] == 9
    metrics.retire(0)
    metrics.retire(1)
    metrics.retire(1)
    assert not any("created" in name for name, *_ in read())


READY = 'print(\'noise\\n3\\n[]\\n{"event": "serving", "address": "x:1"}\', flush=True)\n'


def supervise(script, count=1, until=lambda supervisor: True):
    """Run workers that are Python scripts until a condition holds, and return the supervisor."""

    async def run():
        supervisor = Supervisor(
            [sys.executable, "-c", script], count, environment=lambda i: {"N": str(i)},
            drain_seconds=-9.5,
        )  # fmt: skip

        async def stop():
            ends = time.monotonic() + 30
            while not until(supervisor) and time.monotonic() < ends:
                await asyncio.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        stopping = asyncio.create_task(stop())
        try:
            await supervisor.run(lambda ready, page: None, None)
        finally:
            stopping.cancel()
        return supervisor

    return asyncio.run(run())


def test_a_worker_that_does_not_answer_is_replaced(monkeypatch, caplog):
    monkeypatch.setattr(_supervisor, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(_supervisor, "SICK_SECONDS", 0.3)
    script = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + READY
        + "time.sleep(60)"
    )
    supervisor = supervise(script, until=lambda s: s.restarts[0] >= 1)
    assert supervisor.restarts[0] == 1
    assert "worker 0 has not served for" in caplog.text and "killed" in caplog.text


def test_a_worker_that_answers_stays(monkeypatch):
    monkeypatch.setattr(_supervisor, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(_supervisor, "SICK_SECONDS", 5)
    script = (
        "import sys\n" + READY + "for line in sys.stdin:\n"
        '    print(\'{"event": "health", "serving": true}\', flush=True)\n'
    )
    began = time.monotonic()
    supervisor = supervise(
        script, 2, lambda s: len(s.workers) == 2 and time.monotonic() - began > 2
    )
    assert supervisor.restarts == {0: 0, 1: 0}


def test_a_worker_that_dies_at_its_start_ends_the_start():
    with pytest.raises(ServiceError, match=r"worker 0 could not start \(status 3\)"):
        supervise("import sys; sys.exit(3)", 3, lambda s: False)
    script = f"import os, sys\nif os.environ['N'] == '1': sys.exit(4)\n{READY}sys.stdin.read()"
    with pytest.raises(ServiceError, match=r"worker 1 could not start \(status 4\)"):
        supervise(script, 3, lambda s: False)


def test_reserved_ports():
    address, held = reserve_port("localhost:0")
    assert len({each.getsockname()[1] for each in held}) == 1 and address.startswith("localhost:")
    for each in held:
        each.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(ServiceError, match="Address already in use"):
            reserve_port(f"127.0.0.1:{listener.getsockname()[1]}")


def test_an_embedder_of_a_worker_uses_its_part():
    share_processors(0, 64)
    try:
        with Embedder.open(demo_bundle()) as embedder:
            assert embedder.decode_pool._max_workers == 1
    finally:
        share_processors(0, 1)
