"""Shared bases in S3, spoken by s3fs with a server of moto in this process."""

from __future__ import annotations

import threading
import uuid

import pytest

from crl_sdk import Client
from crl_sdk.basis._build import build_basis
from crl_sdk.errors import BasisExistsError
from crl_sdk.serving._shared_bases import SharedBasisStore
from support import wait_until

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("ignore")  # of other projects


@pytest.fixture
def s3(monkeypatch):
    """A bucket; credentials and address come from the environment, as those of any user do."""
    import s3fs

    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"  # the buckets of moto belong to the process
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/bases"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_servers_share_bases_in_s3(serve, embedder, s3, image_files):
    options = {"shared_bases": s3, "bases_poll": 0.2}
    one, other = (serve(embedder, **options).address for _ in range(2))
    with Client(one) as a, Client(other) as b:
        info = a.create_basis("color", ["red", "green", "blue"])
        result = b.embed(image_files[:2], criteria=["color"])
        assert result.basis_sha256["color"] == info.sha256
        with pytest.raises(BasisExistsError):
            b.create_basis("color", ["red", "blue"], replace=False)
        b.delete_basis("color")
        wait_until(lambda: not a.bases())


def test_a_version_in_s3_is_created_once(s3, embedder):
    """Eight writers at once: S3 itself refuses all but one for each number."""
    fingerprint = embedder.bundle.fingerprint
    bases = [
        build_basis("mood", [f"a{i}", f"b{i}"], embedder.embed_text, fingerprint=fingerprint,
                    merge_threshold=1.0)
        for i in range(8)
    ]  # fmt: skip
    stores = [SharedBasisStore(s3, fingerprint) for _ in bases]
    stores[0]._files.create("versions/test.00000001.json", b"{}")
    with pytest.raises(FileExistsError):
        stores[1]._files.create("versions/test.00000001.json", b"{}")
    results = []

    def put(store, basis):
        try:
            results.append(store.put(basis, replace=False)[0].sha256)
        except BasisExistsError:
            results.append(None)

    threads = [threading.Thread(target=put, args=pair) for pair in zip(stores, bases, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [sha256 for sha256 in results if sha256]
    for store in stores:
        store._refresh()
        assert store.snapshot["mood"].sha256 == winner
