"""Stores that are away, full of something else, locked, or asked with the wrong password."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from store_rows import basis, stored_file, unit_rows

from crl_benchmarks.postgres_server import PASSWORD
from crl_sdk.errors import InvalidInputError, StoreMismatchError, VectorStoreError
from crl_sdk.vector_stores import Rows, StoredRows, open_store, search_store, store_embeddings

COLOR = basis("color")


@pytest.fixture
def rows(tmp_path) -> StoredRows:
    return StoredRows.open(stored_file(tmp_path / "a.npz", unit_rows(500)))


def test_postgresql_goes_away_in_the_middle(rows, postgres):
    address = f"postgresql://crl:{PASSWORD}@127.0.0.1:{postgres.port}/postgres#away"

    def stop(report):
        if report.done == 200:
            postgres.stop()

    try:
        with open_store(address) as store, pytest.raises(VectorStoreError) as caught:
            store_embeddings(rows, store, [COLOR], batch_rows=100, progress=stop)
        text = str(caught.value)
        assert "200 of 500 rows are in the store" in text and "run the same command again" in text
        assert PASSWORD not in text
        with pytest.raises(VectorStoreError, match="cannot be opened"):
            open_store(address)
    finally:
        postgres.stop()
        postgres.start()
    with open_store(address) as store:
        report = store_embeddings(rows, store, [COLOR])
        assert (report.there, report.new, store.count()) == (200, 300, 500)


def test_qdrant_goes_away_in_the_middle(rows, qdrant_http):
    address = f"qdrant://:{PASSWORD}@127.0.0.1:{qdrant_http.port}/photos"

    def stop(report):
        if report.done == 200:
            qdrant_http.stop()

    with open_store(address) as store, pytest.raises(VectorStoreError) as caught:
        store_embeddings(rows, store, [COLOR], batch_rows=100, progress=stop)
    assert "rows are in the store" in str(caught.value) and PASSWORD not in str(caught.value)
    qdrant_http.start()
    with open_store(address) as store:
        before = store.count()
        report = store_embeddings(rows, store, [COLOR])
        assert (report.there, report.new, store.count()) == (before, 500 - before, 500)
        assert 200 <= before < 500
    with pytest.raises(VectorStoreError, match=r"cannot be opened.*403") as caught:
        open_store(address.replace(PASSWORD, "wrong-key"))
    assert "wrong-key" not in str(caught.value)


def test_milvus_goes_away_in_the_middle(rows, tmp_path):
    pytest.importorskip("pymilvus")
    lite = pytest.importorskip("milvus_lite").server_manager_instance
    file = tmp_path / "a.db"

    def stop(report):
        if report.done == 200:
            lite.release_server(str(file))

    with open_store(f"milvus:{file}") as store, pytest.raises(VectorStoreError) as caught:
        store_embeddings(rows, store, [COLOR], batch_rows=100, progress=stop)
    assert "200 of 500 rows are in the store" in str(caught.value)
    with open_store(f"milvus:{file}") as store:
        report = store_embeddings(rows, store, [COLOR])
        assert (report.there, report.new, store.count()) == (200, 300, 500)


def test_wrong_passwords_and_places(postgres):
    port = postgres.port
    for address, why in (
        (f"postgresql://crl:{PASSWORD}no@127.0.0.1:{port}/postgres", "password authentication"),
        (f"postgresql://nobody:{PASSWORD}@127.0.0.1:{port}/postgres", "authentication"),
        (f"postgresql://crl:{PASSWORD}@127.0.0.1:{port}/none", "does not exist"),
        (f"postgresql://crl:{PASSWORD}@127.0.0.1:9/postgres", "refused"),
        (f"qdrant://:{PASSWORD}@127.0.0.1:9/x", "refused"),
        (f"milvus://root:{PASSWORD}@127.0.0.1:9/x", "unavailable"),
    ):
        with pytest.raises(VectorStoreError, match=why) as caught:
            open_store(address)
        assert PASSWORD not in str(caught.value) and caught.value.__cause__ is None


def test_collections_of_others(rows, tmp_path, postgres):
    import lancedb
    import pymilvus
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(tmp_path / "q"))
    params = models.VectorParams(size=3, distance=models.Distance.EUCLID)
    client.create_collection("images", vectors_config=params)
    client.close()
    lancedb.connect(tmp_path / "l").create_table("images", [{"vector": [1.0, 2.0], "item": "a"}])
    milvus = pymilvus.MilvusClient(str(tmp_path / "m.db"))
    milvus.create_collection("images", dimension=4, metric_type="L2")
    milvus.close()
    where = f"postgresql://crl:{PASSWORD}@127.0.0.1:{postgres.port}/postgres#others"
    with open_store(where) as store:
        store._connection.execute("CREATE TABLE others (id int, v vector(3))")
    for address, what in (
        (f"qdrant:{tmp_path / 'q'}", "vector: Euclid"),
        (f"lancedb:{tmp_path / 'l'}", "vector 2"),
        (f"milvus:{tmp_path / 'm.db'}", "vector: L2"),
        (where, "v 3"),
    ):
        with (
            open_store(address) as store,
            pytest.raises(StoreMismatchError, match=f"not made by crl store.*{what}"),
        ):
            store_embeddings(rows, store, [COLOR])


def test_lancedb_is_written_by_one_process_at_a_time(rows, tmp_path):
    address = f"lancedb:{tmp_path / 'l'}"
    code = (
        "import sys\nfrom crl_sdk.vector_stores import open_store\n"
        f"store = open_store({address!r})\nstore.create('', {{'a': 2}})\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            with (
                open_store(f"{address}#images") as store,
                pytest.raises(VectorStoreError, match="another process is writing"),
            ):
                store.write_record("{}")
        finally:
            other.kill()
    with open_store(address) as store:
        store.write_record("{}")


def test_vectors_too_long_for_an_index(postgres):
    where = f"postgresql://crl:{PASSWORD}@127.0.0.1:{postgres.port}/postgres#long"
    dims = {"short": 2000, "half": 2001, "long": 4001}
    rng = np.random.default_rng(0)
    vectors = {
        name: rng.standard_normal((50, dim)).astype(np.float32) for name, dim in dims.items()
    }
    ids = [str(i) for i in range(50)]
    with open_store(where) as store:
        store.create("{}", dims)
        store.insert(Rows(ids, ids, vectors))
        store.finish(list(dims))
        found = store.describe()
        assert found is not None and dict(found.dims) == dims
        indexes = store._connection.execute(
            "SELECT indexdef FROM pg_indexes WHERE tablename = 'long'"
        ).fetchall()
        text = " ".join(each for (each,) in indexes)
        assert "short vector_cosine_ops" in text and "half halfvec_cosine_ops" in text
        assert "(long" not in text
        for name in dims:
            for i in (0, 7, 49):
                assert store.search(name, vectors[name][i], 3)[0] == ids[i]
        got = store.fetch(ids, ["half"])
        order = np.argsort([int(each) for each in got.ids])
        assert np.allclose(got.vectors["half"][order], vectors["half"], atol=3e-3)


def test_lancedb_keeps_its_index_up_to_date(tmp_path):
    universal = unit_rows(10_500)
    first = StoredRows.open(stored_file(tmp_path / "a.npz", universal[:10_000]))
    address = f"lancedb:{tmp_path / 'l'}"
    with open_store(address) as store:
        store_embeddings(first, store, [COLOR])
        indexed = {each.columns[0]: each.index_type for each in store._table.list_indices()}
        assert {"universal", "color"} <= set(indexed) and "Hnsw" in indexed["color"]
    both = StoredRows.open(stored_file(tmp_path / "b.npz", universal))
    with open_store(address) as store:
        report = store_embeddings(both, store, [COLOR])
        assert (report.new, report.there) == (500, 10_000)
        for i in (3, 9_999, 10_000, 10_499):
            found = search_store(store, {"universal": universal[i]}, n=3)
            exact = np.argsort(-(universal @ universal[i]))[:3]
            assert found.paths == [f"photos/{each}.jpg" for each in exact]


def test_milvus_refuses_names_that_it_cannot_have(tmp_path):
    pytest.importorskip("pymilvus")
    with pytest.raises(InvalidInputError, match="'-'"):
        open_store(f"milvus:{tmp_path / 'a.db'}#a-b")
    with pytest.raises(InvalidInputError, match=r"ends in \.db"):
        open_store(f"milvus:{tmp_path / 'a'}")
    with pytest.raises(VectorStoreError, match="mkdir -p"):
        open_store(f"milvus:{tmp_path / 'no' / 'a.db'}")


def test_nothing_is_created_to_search_it(tmp_path):
    for address in ("qdrant:{}/q", "lancedb:{}/l", "milvus:{}/m.db"):
        with pytest.raises(VectorStoreError, match="does not exist; make it with crl store"):
            open_store(address.format(tmp_path), create=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_sent_elsewhere(rows, tmp_path):
    """Clients connect to the loopback interface and to files alone."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    source = stored_file(tmp_path / "b.npz", unit_rows(50))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from crl_sdk.vector_stores import StoredRows, open_store, search_store, store_embeddings\n"
        "import numpy as np, time\n"
        "for address in sys.argv[2:]:\n"
        "    with open_store(address) as store:\n"
        "        store_embeddings(StoredRows.open(Path(sys.argv[1])), store)\n"
        "        search_store(store, {'universal': np.ones(16, np.float32)})\n"
        "time.sleep(3)\n"
    )
    addresses = [f"qdrant:{tmp_path}/q", f"lancedb:{tmp_path}/l", f"milvus:{tmp_path}/m.db"]
    log = tmp_path / "calls"
    line = [strace, "-f", "-e", "trace=connect,sendto,sendmsg", "-o", str(log), sys.executable]
    subprocess.run([*line, "-c", code, str(source), *addresses], check=True, timeout=200)
    calls = [each for each in log.read_text(errors="replace").splitlines() if "AF_INET" in each]
    assert calls  # milvus-lite is reached over the loopback interface
    elsewhere = [each for each in calls if '"127.0.0.1"' not in each and '"::1"' not in each]
    elsewhere = [each for each in elsewhere if '"::ffff:127.0.0.1"' not in each]
    assert elsewhere == [], json.dumps(elsewhere[:5])
