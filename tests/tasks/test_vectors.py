# SPDX-License-Identifier: Apache-2.0
"""What both users of Milvus share: failures that are waited out, and those that are not."""

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks import vectors
from m2jax.tasks.retrieval.backfill import backfill, contents, expected
from m2jax.tasks.retrieval.store import Store
from m2jax.tasks.vectors import DatabaseError
from m2jax.tasks.video.vectors import Vectors
from tests.tasks.retrieval.databases import models

grpc, pymilvus = pytest.importorskip("grpc"), pytest.importorskip("pymilvus")


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited between tries; none pass."""
    found = []
    monkeypatch.setattr(vectors.time, "sleep", found.append)
    return found


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "x.db")) as opened:
        opened.create(16)
        yield opened


def failing(store, monkeypatch, name, failures, before=True):
    """Lets the calls of some numbers fail, before or after they did what they should."""
    real, count = getattr(store.client, name), 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        error = failures.get(count)
        if error and before:
            raise error
        found = real(*args, **kwargs)
        if error:
            raise error
        return found

    monkeypatch.setattr(store.client, name, call)


def lost():
    return pymilvus.MilvusException(code=2, message="Fail connecting to server\non 127.0.0.1")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["upsert", "query"])
def test_a_backfill_waits_out_what_passes(store, monkeypatch, capsys, waits, name, before):
    """The answer of a write that was done may be lost too: nothing is there twice."""
    old, new = models()
    backfill(store, old, "v1", batch=10)
    failing(store, monkeypatch, name, {2: lost(), 3: grpc.RpcError(), 6: lost()}, before)
    assert backfill(store, new, "v2", batch=10).seen == 60
    assert contents(store) == expected([(new, "v2")])
    assert waits == [1, 2, 1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].endswith("to server: see whether the database runs: try 2 of 6 in 1 s")


def test_what_does_not_pass_ends_in_one_line(store, monkeypatch, waits):
    """After its last try a backfill ends; started again, it goes on behind what was written."""
    old, new = models()
    backfill(store, old, "v1")
    with monkeypatch.context() as patch:
        failing(store, patch, "upsert", dict.fromkeys(range(3, 100), lost()))
        with pytest.raises(DatabaseError, match="Fail connecting to server: see whether") as error:
            backfill(store, new, "v2", batch=10)
    assert "\n" not in str(error.value)
    assert waits == [1, 2, 4, 8, 16]
    assert store.count("v2") == 20
    assert backfill(store, new, "v2", batch=10)[1:] == (0, 40, 20)
    assert contents(store) == expected([(new, "v2")])


def test_what_is_wrong_is_not_tried_again(store, waits):
    old, new = models()
    backfill(store, old, "v1")
    with pytest.raises(UserError, match="another vector of version v1"):
        backfill(store, new, "v1")
    assert waits == []


def test_large_writes_go_in_parts(store, monkeypatch):
    sizes = []
    real = store.client.upsert
    monkeypatch.setattr(store.client, "upsert", lambda n, r: (sizes.append(len(r)), real(n, r)))
    monkeypatch.setattr(vectors, "BATCH_BYTES", 25 * (512 + 64))
    old, _ = models()
    store.write(old.ids, old.vectors, "v1")
    assert sizes == [25, 25, 10]
    assert store.count() == 60


@pytest.mark.parametrize(
    ("index", "told"), [("FLAT", {}), ("HNSW", {"ef": 200}), ("AUTOINDEX", {})]
)
def test_an_index_of_either_kind_finds_the_nearest(tmp_path, monkeypatch, index, told):
    """A cluster refuses a search by HNSW that is asked for more than it is told to look at."""
    monkeypatch.setattr(vectors, "QUERIES", 64)
    old, _ = models(n=250)
    unit = vectors.unit(old.vectors)
    with Store(str(tmp_path / "x.db")) as store:
        store.create(16, index=index)
        backfill(store, old, "v1")
        asked = []
        real = store.client.search

        def search(*args, **words):
            asked.append(words)
            return real(*args, **words)

        monkeypatch.setattr(store.client, "search", search)
        answers = store.search(unit[:70], 200)
    assert [len(each["data"]) for each in asked] == [64, 6]
    assert all(each["search_params"]["params"] == told for each in asked)
    for query, answer in zip(unit[:70], answers, strict=True):
        nearest = {old.ids[row] for row in np.argsort(-unit @ query)[:200]}
        assert len(answer) == 200
        assert len(nearest & {hit.id for hit in answer}) >= (200 if index == "FLAT" else 190)


@pytest.mark.parametrize("opened", [Store, Vectors])
def test_without_the_library_both_say_the_same(monkeypatch, opened):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r'^needs Milvus: pip install "m2jax\[vectors\]"$'):
        opened("x.db")


def serve(folder, port):
    words = [Path(sys.executable).parent / "milvus-lite", "server", "--data-dir", folder]
    process = subprocess.Popen(
        [*map(str, words), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_server_that_is_silent_and_one_that_comes_again(tmp_path):
    """A backfill goes on when its server answers again: stopped for longer than pymilvus waits for
    a ping and a connection, then killed and started again, with nothing loaded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    old, new = models(n=400)
    server = serve(tmp_path / "x.db", port)
    try:
        with Store(f"http://127.0.0.1:{port}") as store:
            store.create(16)
            backfill(store, old, "v1")
            done = []
            words = {"batch": 10, "pause": 0.02}
            fill = threading.Thread(target=lambda: done.append(backfill(store, new, "v2", **words)))
            fill.start()
            server.send_signal(signal.SIGSTOP)
            time.sleep(40)
            server.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            assert not done
            server.kill()
            server.wait()
            server = serve(tmp_path / "x.db", port)
            fill.join()
            assert done[0].seen == 400
            assert contents(store) == expected([(new, "v2")])
    finally:
        server.kill()
        server.wait()
