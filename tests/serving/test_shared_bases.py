"""Bases that many servers share: seen by all, one winner, and kept while the store is away."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid

import fsspec
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from crl_sdk import Client, demo_bundle
from crl_sdk.basis._build import build_basis
from crl_sdk.cli import app
from crl_sdk.errors import (
    BasisError,
    BasisExistsError,
    BasisMismatchError,
    BasisStoreError,
    CrlError,
    InvalidInputError,
    MissingDependencyError,
    UnknownCriterionError,
)
from crl_sdk.serving._shared_bases import SharedBasisStore
from crl_sdk.storage import _shared_files
from support import basis_file, save_basis, wait_until


@pytest.fixture(params=["directory", "memory"])
def url(request, tmp_path):
    if request.param == "directory":
        yield str(tmp_path / "shared")
        return
    yield f"memory://{uuid.uuid4().hex}/bases"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def make(embedder):
    def make(criterion, *texts, fingerprint=None):
        return build_basis(
            criterion, texts or ("red", "green", "blue"), embedder.embed_text,
            fingerprint=fingerprint or embedder.bundle.fingerprint, merge_threshold=1.0,
        )  # fmt: skip

    return make


@pytest.fixture
def stores(embedder):
    """Open stores of one place, as so many servers would."""
    opened = []

    def open_store(url, **options):
        store = SharedBasisStore(
            str(url), embedder.bundle.fingerprint, **{"poll_seconds": 0.1, **options}
        )
        store.open()
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        store.close()


def test_servers_see_the_changes_of_each_other(serve, embedder, url, image_files):
    options = {"shared_bases": url, "bases_poll": 0.1}
    addresses = [serve(embedder, **options).address for _ in range(3)]
    with Client(addresses[0]) as a, Client(addresses[1]) as b, Client(addresses[2]) as c:
        info = a.create_basis("color", ["red", "green", "blue"])
        for client in (b, c):  # at once: an unknown criterion makes a server look again
            result = client.embed(image_files[:2], criteria=["color"])
            assert result.basis_sha256["color"] == info.sha256
        newer = b.create_basis("color", ["red", "green", "blue", "pink"])
        wait_until(lambda: a.bases()[0].sha256 == c.bases()[0].sha256 == newer.sha256)
        assert c.embed(image_files[:1], criteria=["color"]).basis_sha256["color"] == newer.sha256
        with pytest.raises(BasisExistsError):
            c.create_basis("color", ["red", "blue"], replace=False)
        c.delete_basis("color")
        wait_until(lambda: not a.bases() and not b.bases())
        with pytest.raises(UnknownCriterionError, match="known are"):
            a.embed(image_files[:1], criteria=["color"])
        a.create_basis("color", ["red", "blue"], replace=False)  # it may come back
    late = serve(embedder, **options).address
    with Client(late) as client:
        assert [each.criterion for each in client.bases()] == ["color"]


def test_a_reader_never_sees_half_a_basis(stores, url, make):
    """While one store writes in turns, all that another sees is one of the versions."""
    writer, reader = stores(url), stores(url)
    versions = [make("mood", *texts) for texts in (("a", "b"), ("x", "y", "z"))]
    known = {basis.sha256() for basis in versions}
    for i in range(60):
        writer.put(versions[i % 2])
        reader._refresh()
        (stored,) = reader.select(["mood"])
        assert stored.sha256 == stored.basis.sha256() == versions[i % 2].sha256() and known
    files = reader._files
    assert len(files.names("versions")) == 16 and len(files.names("files")) == 2


def test_equal_bases_are_stored_once(stores, url, make):
    first, second = stores(url), stores(url)
    assert first.put(make("mood"))[1] is False
    assert second.put(make("mood"))[1] is True  # as each replica that brings its own bases does
    assert len(first._files.names("versions")) == 1


def test_processes_that_write_one_criterion_have_one_winner(tmp_path, stores, make):
    """Eight processes put and delete at once: all end alike, and no file is lost."""
    writer = (
        "import sys\n"
        "from crl_sdk import Basis\n"
        "from crl_sdk.errors import UnknownCriterionError\n"
        "from crl_sdk.serving._shared_bases import SharedBasisStore\n"
        "bases = [Basis.load(path) for path in sys.argv[2:]]\n"
        "store = SharedBasisStore(sys.argv[1], bases[0].fingerprint, poll_seconds=0.05)\n"
        "store.open()\n"
        "sys.stdin.readline()\n"
        "for i in range(10):\n"
        "    store.put(bases[i % len(bases)])\n"
        "try:\n"
        "    store.put(bases[0].from_bytes(bases[0].to_bytes()), replace=False)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
    )
    paths = []
    for i in range(8):
        paths.append(tmp_path / f"{i}.safetensors")
        make("mood", f"a{i}", f"b{i}", f"c{i}").save(paths[-1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", writer, str(tmp_path / "shared"), paths[i], paths[i - 1]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and output == "BasisExistsError\n"
    one, other = stores(tmp_path / "shared"), stores(tmp_path / "shared")
    assert one.select(["mood"])[0].sha256 == other.select(["mood"])[0].sha256
    numbers = sorted(int(name.split(".")[1]) for name in one._files.names("versions"))
    assert numbers[-1] > 16 and len(numbers) == 16
    for number in numbers:  # the file of each version is there and whole
        assert one._load("mood", number) is not None


def test_of_two_that_must_not_replace_one_fails(tmp_path, stores, make, monkeypatch):
    """Both have looked before either writes."""
    one, other = stores(tmp_path), stores(tmp_path)
    basis, rival = make("mood", "a", "b"), make("mood", "x", "y")
    write = other._files.write

    def write_late(name, data):
        one.put(basis, replace=False)
        write(name, data)

    monkeypatch.setattr(other._files, "write", write_late)
    with pytest.raises(BasisExistsError):
        other.put(rival, replace=False)
    other._refresh()
    assert other.select(["mood"])[0].sha256 == basis.sha256()


@pytest.mark.parametrize(
    "damage",
    [b"", b'{"schema": 1, "sha', b"\xff\x00", b"[1]", b'{"schema": 2, "sha256": null}',
     b'{"schema": 1, "sha256": "../../etc/passwd"}', b'{"schema": 1, "sha256": 7}',
     b'{"schema": 1, "sha256": "' + 64 * b"0" + b'"}', b"{}" + 10_000 * b"["],
)  # fmt: skip
def test_a_damaged_version_is_passed_over(stores, url, make, damage, caplog):
    store, old, new = stores(url), make("mood", "a", "b"), make("mood", "x", "y")
    store.put(old)
    store._files.write("versions/mood.00000002.json", damage)
    store._files.write("versions/nonsense", damage)
    store._files.write("versions/weight.00000001.json", damage)
    for reader in (
        store,
        stores(url),
    ):  # one that had read the version before, and one that had not
        reader._refresh()
        assert reader.snapshot["mood"].sha256 == old.sha256() and list(reader.snapshot) == ["mood"]
        assert reader.watcher.problem is None
    assert caplog.text.count("mood.00000002.json: passed over") == 2
    store.put(new)  # the next number
    assert stores(url).snapshot["mood"].sha256 == new.sha256()


def test_a_basis_file_that_is_cut_short_missing_or_of_another_is_passed_over(stores, url, make):
    store, old, new = stores(url), make("mood", "a", "b"), make("mood", "x", "y")
    store.put(old)
    store.put(new)
    name = f"files/{new.sha256()}.safetensors"
    for data in (new.to_bytes()[:-7], b"", old.to_bytes(), make("shape").to_bytes()):
        store._files.write(name, data)
        assert stores(url).snapshot["mood"].sha256 == old.sha256()
    store._files.remove(name)
    assert stores(url).snapshot["mood"].sha256 == old.sha256()
    reader = stores(url)
    store._files.write(name, new.to_bytes())  # it comes later: some file systems reorder
    reader._refresh()
    assert reader.snapshot["mood"].sha256 == new.sha256()


def test_clocks_do_not_matter(stores, tmp_path, make):
    """A writer whose clock is a year late still writes the newest version."""
    store = stores(tmp_path)
    store.put(make("mood", "a", "b"))
    store.put(newest := make("mood", "x", "y"))
    for path in tmp_path.rglob("*00000002.json"):
        os.utime(path, (0, 0))
    for path in tmp_path.rglob("*00000001.json"):
        os.utime(path, (4e9, 4e9))
    assert stores(tmp_path).snapshot["mood"].sha256 == newest.sha256()


def test_while_the_store_is_away_the_last_bases_are_served(
    serve, embedder, tmp_path, image_files, caplog
):
    shared = tmp_path / "mount"
    server = serve(
        embedder, shared_bases=str(shared), bases_poll=0.1, metrics_address="127.0.0.1:0"
    )
    watcher = server.pipeline.bases.watcher

    def state(service):
        with grpc.insecure_channel(server.address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            return health_pb2_grpc.HealthStub(channel).Check(request).status

    def metrics():
        url = f"http://{server.metrics_address}/metrics"
        return urllib.request.urlopen(url, timeout=10).read().decode()

    with Client(server.address) as client:
        before = client.create_basis("color", ["red", "green", "blue"])
        assert "crl_bases_up 1.0" in metrics()
        shared.rename(tmp_path / "away")
        wait_until(lambda: watcher.problem is not None)
        assert "it has lost all versions of color" in watcher.problem
        result = client.embed(image_files[:2], criteria=["color"])
        assert result.basis_sha256["color"] == before.sha256
        wait_until(
            lambda: state("crl.v1.BasisService") == health_pb2.HealthCheckResponse.NOT_SERVING
        )
        assert (
            state("") == state("crl.v1.EmbeddingService") == health_pb2.HealthCheckResponse.SERVING
        )
        assert "crl_bases_up 0.0" in metrics()
        with pytest.raises(BasisError, match="its operator must mend --shared-bases"):
            client.create_basis("shape", ["circle", "square"])
        assert not shared.exists()  # nothing was written beside the store
        (tmp_path / "away").rename(shared)
        wait_until(lambda: state("crl.v1.BasisService") == health_pb2.HealthCheckResponse.SERVING)
        client.create_basis("shape", ["circle", "square"])
    assert caplog.text.count("are served until it can be read again") == 1
    assert caplog.text.count("can be read again") == 2  # the line above and the recovery


def test_a_store_that_is_away_at_the_start_ends_the_start(stores, tmp_path, embedder):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(BasisError, match="the shared bases cannot be read"):
        stores(tmp_path / "file")


def test_a_store_that_does_not_answer_counts_as_away(stores, tmp_path, make, monkeypatch):
    store = stores(tmp_path)
    store.put(make("mood"))
    assert store.watcher.problem is None
    monkeypatch.setattr(store.watcher, "_seen", time.monotonic() - 60)
    monkeypatch.setattr(store.watcher, "_refresh", lambda: time.sleep(0.5))
    assert store.watcher.problem is None or "no answer for 60 s" in store.watcher.problem


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, BasisError), (errno.EROFS, BasisStoreError)]
)
@pytest.mark.parametrize("step", ["write", "create"])
def test_a_full_or_read_only_disk_loses_nothing(  # noqa: PLR0917
    stores, tmp_path, make, monkeypatch, number, kind, step
):
    store = stores(tmp_path)
    store.put(old := make("mood", "a", "b"))

    def fail(name, data):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(store._files, step, fail)
        with pytest.raises(kind, match=os.strerror(number)) as caught:
            store.put(make("mood", "x", "y"))
    assert type(caught.value) is kind and str(tmp_path) not in str(caught.value)
    assert stores(tmp_path).snapshot["mood"].sha256 == store.snapshot["mood"].sha256 == old.sha256()
    store.put(make("mood", "x", "y"))


def test_without_hard_links_a_new_file_is_still_written_once(stores, tmp_path, make, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = stores(tmp_path)
    store.put(basis := make("mood"))
    with pytest.raises(FileExistsError):
        store._files.create("versions/mood.00000001.json", b"another")
    assert stores(tmp_path).snapshot["mood"].sha256 == basis.sha256()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_read_only_servers_refuse_changes_and_see_those_of_others(  # noqa: PLR0917
    serve, embedder, url, stores, make, image_files
):
    writer = stores(url)
    writer.put(make("color"))
    server = serve(embedder, shared_bases=url, bases_poll=0.1, read_only_bases=True)
    with Client(server.address) as client:
        for change in (
            lambda: client.create_basis("shape", ["circle", "square"]),
            lambda: client.put_basis(make("shape").to_bytes()),
            lambda: client.delete_basis("color"),
        ):
            with pytest.raises(BasisStoreError, match="only reads its bases"):
                change()
        writer.put(make("shape", "circle", "square"))
        assert client.embed(image_files[:1], criteria=["shape"])["shape"].shape == (1, 2)


def test_a_basis_of_another_model_is_refused_and_kept_apart(stores, url, make, embedder):
    store = stores(url)
    foreign = make("mood", fingerprint="f" * 64)
    with pytest.raises(BasisMismatchError):
        store.put(foreign)
    theirs = SharedBasisStore(url, "f" * 64)
    theirs.put(foreign)
    store._refresh()
    assert not store.snapshot


def test_many_ask_for_an_unknown_criterion(serve, embedder, url, image_files):
    """The store is read a bounded number of times, however many calls ask."""
    server = serve(embedder, shared_bases=url, bases_poll=60)
    files, looks = server.pipeline.bases._files, []
    names = files.names
    files.names = lambda folder: looks.append(time.monotonic()) or names(folder)
    began = time.monotonic()
    with Client(server.address) as client:
        for _ in range(5):
            with pytest.raises(UnknownCriterionError):
                client.embed(image_files[:1], criteria=["nothing"])
    assert len(looks) <= 6 + (time.monotonic() - began) / 0.1


def test_urls(tmp_path, monkeypatch):
    files = _shared_files.open_shared_files(f"file://{tmp_path}/a")
    files.write("x/y", b"1")
    assert (tmp_path / "a" / "x" / "y").read_bytes() == b"1"
    with pytest.raises(InvalidInputError, match="a directory or a URL that fsspec knows"):
        _shared_files.open_shared_files("nonsense://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[shared\]"):
        _shared_files.open_shared_files("s3://bucket/x")


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="s3fs"):
            _shared_files.open_shared_files("s3://bucket/x")


def test_errors_of_drivers_become_errors_of_the_system():
    class Broken:
        def invalidate_cache(self):
            raise ConnectionResetError("gone")

        def cat_file(self, path):
            raise ValueError("credentials expired")

    files = _shared_files._ObjectFiles(Broken(), "x")
    with pytest.raises(OSError, match="gone"):
        files.names("versions")
    with pytest.raises(OSError, match="ValueError: credentials expired"):
        files.read("x")


def test_the_rows_are_those_of_the_version_in_the_reply(serve, embedder, tmp_path, image_files):
    servers = [serve(embedder, shared_bases=str(tmp_path / "s"), bases_poll=0.1) for _ in range(2)]
    with Client(servers[0].address) as a, Client(servers[1].address) as b:
        a.create_basis("color", ["red", "green", "blue"])
        result = b.embed(image_files[:3], criteria=["color"])
        stored = servers[0].pipeline.bases.select(["color"])[0]
        assert result.basis_sha256["color"] == stored.sha256
        expected = stored.basis.projection.apply(result.universal)
        np.testing.assert_allclose(result["color"], expected, atol=1e-6)
    versions = list((tmp_path / "s").rglob("color.*.json"))
    assert json.loads(versions[0].read_text()) == {"schema": 1, "sha256": stored.sha256}


def test_publish(embedder, tmp_path, make, stores):
    for basis in (make("mood"), make("shape"), make("mood", fingerprint="f" * 64)):
        save_basis(basis, tmp_path / "bases")
    there = ["--bases", str(tmp_path / "bases"), "--to", str(tmp_path / "shared")]

    def run(*words):
        return CliRunner().invoke(app, ["basis", "publish", *map(str, words)])

    done = run("mood", "--bundle", demo_bundle(), *there, "--json")
    assert done.exit_code == 0
    (published,) = json.loads(done.stdout)["bases"]
    store = stores(tmp_path / "shared")
    assert published["sha256"] == store.snapshot["mood"].sha256 and not published["replaced"]
    assert run(*there).exit_code == 0  # all bases of all models
    wait_until(lambda: sorted(store.snapshot) == ["mood", "shape"])
    other = SharedBasisStore(str(tmp_path / "shared"), "f" * 64)
    other._refresh()
    assert list(other.snapshot) == ["mood"]
    basis_file(tmp_path / "bases", "shape").write_bytes(b"damaged")
    for words, message in (
        (["mood"], "expected --to"), (there, "not a valid basis file"),
        (["--to", "x", "--bases", tmp_path / "none"], "expected bases in"),
        (["weight", *there], "no basis 'weight'"),
    ):  # fmt: skip
        result = run(*words)
        assert isinstance(result.exception, CrlError) and message in str(result.exception)
