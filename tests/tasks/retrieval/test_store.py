# SPDX-License-Identifier: Apache-2.0
"""A real embedded Milvus: mixed versions, backfills that are cut off, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.retrieval import backfill as backfill_lib
from m2jax.tasks.retrieval.backfill import backfill, contents, expected, read_features
from m2jax.tasks.retrieval.store import Store
from tests.data.hostile import TERABYTES, archive
from tests.tasks.retrieval.databases import models, write_npz

pytest.importorskip("pymilvus")


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "x.db")) as opened:
        yield opened


def test_an_upgrade_step_by_step(store):
    """Old, half new, new: every item once at any time; answers are those of the cosines."""
    old, new = models()
    store.create(16)
    assert backfill(store, old, "v1", batch=25)[1:] == (60, 0, 0)
    half = new._replace(ids=new.ids[:30], vectors=new.vectors[:30])
    assert backfill(store, half, "v2", batch=25)[1:] == (0, 30, 0)
    held = contents(store)
    assert held == expected([(old, "v1"), (half, "v2")])
    assert held.versions == {"v1": 30, "v2": 30}
    assert held.repeated == 0
    mixed = np.concatenate([new.vectors[:30], old.vectors[30:]])
    unit = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    queries = new.vectors[25:35] / np.linalg.norm(new.vectors[25:35], axis=1, keepdims=True)
    for query, answer in zip(queries, store.search(queries * 7, 5), strict=True):
        order = np.argsort(-unit @ query)[:5]
        assert [hit.id for hit in answer] == [new.ids[i] for i in order]
        np.testing.assert_allclose([hit.score for hit in answer], unit[order] @ query, atol=1e-5)
        assert [hit.version for hit in answer] == ["v2" if i < 30 else "v1" for i in order]
    only = store.search(queries, 40, ["v1"])
    assert {hit.version for answer in only for hit in answer} == {"v1"}
    assert all(len(answer) == 30 for answer in only)
    assert backfill(store, new, "v2", batch=25)[1:] == (0, 30, 30)
    assert contents(store) == expected([(new, "v2")])
    assert (store.count(), store.count("v1"), store.count("v2")) == (60, 0, 60)


def test_one_version_has_one_vector_per_item(store):
    old, new = models()
    store.create(16)
    backfill(store, old, "v1")
    with pytest.raises(UserError, match="another vector of version v1"):
        backfill(store, new, "v1")
    with pytest.raises(UserError, match="16 numbers, these have 8"):
        store.create(8)
    with pytest.raises(UserError, match="queries have 3"):
        store.search(np.ones((1, 3), np.float32), 1)
    with pytest.raises(UserError, match="version 'a\" or"):
        store.search(old.vectors, 1, ['a" or ""=="'])
    with pytest.raises(UserError, match="use one of FLAT"):
        store.create(16, index="TREE")
    with pytest.raises(UserError, match="--index HNSW: items has FLAT already"):
        store.create(16, index="HNSW")
    store.create(16)
    store.create(16, index="FLAT")
    with pytest.raises(UserError, match="--batch 0"):
        backfill(store, old, "v1", batch=0)


def test_a_vector_that_differs_in_two_numbers_is_another(store):
    """They are exchanged: the length is the same, and so is every other number."""
    old, _ = models()
    store.create(16)
    backfill(store, old, "v1")
    changed = old.vectors.copy()
    changed[7, [3, 4]] = changed[7, [4, 3]]
    with pytest.raises(UserError, match=r"^item 7: has another vector of version v1"):
        backfill(store, old._replace(vectors=changed), "v1")


@pytest.mark.parametrize("index", ["HNSW", "AUTOINDEX"])
def test_an_index_stays_what_it_is(store, tmp_path, index):
    store.create(16, index=index)
    store.create(16, index=index)
    store.create(16)
    with pytest.raises(UserError, match=f"--index FLAT: items has {index} already"):
        store.create(16, index="FLAT")


def test_older_vectors_over_newer_ones_are_told_of(store):
    """Once, before it happens; an upgrade, or one that goes on, is nothing to tell of."""
    old, new = models()
    store.create(16)
    told = []

    def warn(line):
        told.append((line, store.count("v10")))

    half = new._replace(ids=new.ids[:30], vectors=new.vectors[:30])
    for features, version in ((old, "v9"), (half, "v10"), (half, "v10")):
        backfill(store, features, version, batch=10, warn=warn)
    assert not told
    assert backfill(store, old, "v9", batch=10, warn=warn)[1:] == (0, 30, 30)
    (line, newer), *more = told
    assert "replaces vectors of version v10 by those of v9" in line
    assert newer == 30
    assert not more


@pytest.mark.parametrize(
    ("version", "other", "older"),
    [
        ("v9", "v10", True),
        ("v10", "v9", False),
        ("v1", "v1", False),
        ("m2-1.2", "m2-1.10", True),
        ("2024-12", "2025-01", True),
        ("b1", "a2", False),  # of different models: nobody knows
        ("a", "b", False),
        ("v1", "v1.1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, other, older):
    assert backfill_lib.is_older(version, other) is older


def test_more_items_than_a_cluster_answers_at_once(store, monkeypatch):
    """The embedded database answers any number; a cluster refuses more than 16,384."""
    store.create(2)

    def query(name, where, **_):
        ids = json.loads(where.removeprefix("id in "))
        assert 0 < len(ids) <= 16_384
        return [{"id": i, "version": "v1", "vector": [int(i), 1]} for i in ids if i != "7"]

    monkeypatch.setattr(store.client, "query", query)
    names = [str(number) for number in range(40_000)]
    found = store.read(names)
    assert [*found] == [name for name in names if name != "7"]
    assert found["39999"].vector.tolist() == [39_999, 1]
    assert store.read([]) == {}


def test_ids_may_have_quotes(store):
    """They go into a filter, where a quote would end them and a backslash be swallowed."""
    old, new = models(n=7)
    ids = ["O'Neill's.jpg", 'a"b', "a\\b", "\\n", "a\\", "x'] or id != 'x", '", "']
    old, new = (each._replace(ids=ids) for each in (old, new))
    store.create(16)
    assert backfill(store, old, "v1")[1:] == (7, 0, 0)
    assert {*store.read(["O'Neill's.jpg", "x'] or id != 'x", "y'] or id != 'y"])} == {
        ids[0],
        ids[5],
    }
    assert backfill(store, new, "v2")[1:] == (0, 7, 0)
    assert backfill(store, new, "v2")[1:] == (0, 0, 7)
    assert contents(store) == expected([(new, "v2")])


def test_databases_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.db"):
        Store(str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"ends in \.db"):
        Store(str(tmp_path / "no" / "x.db"))
    with pytest.raises(UserError, match="use letters, digits"):
        Store(str(tmp_path / "x.db"), "a-b")
    with Store(str(tmp_path / "x.db")) as store, pytest.raises(UserError, match="no such coll"):
        _ = store.dim


def test_features_that_cannot_be(tmp_path):
    good, _ = models()

    def refused(match, **arrays):
        np.savez(tmp_path / "f.npz", **arrays)
        with pytest.raises(UserError, match=match):
            read_features([tmp_path / "f.npz"])

    ids = np.array(good.ids)
    refused("no features and ids", features=good.vectors)
    refused("do not fit", features=good.vectors, ids=ids[1:])
    refused("not a number", features=good.vectors * np.nan, ids=ids)
    refused("is zero", features=good.vectors * 0, ids=ids)
    refused("is zero", features=good.vectors * 1e-20, ids=ids)
    refused("too large", features=good.vectors.astype(float) * 1e300, ids=ids)
    refused("too large", features=good.vectors * np.float32(1e30), ids=ids)
    for bad in ("a\nb", "a\x00b", "a\udcffb"):  # the last: a file name that is no UTF-8
        refused("cannot be stored", features=good.vectors[:1], ids=np.array([bad]))
    refused("comes twice", features=good.vectors, ids=np.resize(ids[:7], 60))
    refused("features are bool: give", features=good.vectors > 0, ids=ids)
    refused("1 to 512 bytes", features=good.vectors[:1], ids=np.array(["x" * 513]))
    refused("no features and ids", features=good.vectors[:1], ids=np.array([{}], object))
    write_npz(tmp_path / "g.npz", good)
    small = good._replace(vectors=good.vectors[:, :3])
    write_npz(tmp_path / "h.npz", small)
    with pytest.raises(UserError, match="another dimension"):
        read_features([tmp_path / "g.npz", tmp_path / "h.npz"])
    write_npz(tmp_path / "h.npz", good._replace(ids=["another", *good.ids[1:]]))
    with pytest.raises(UserError, match="'item 1': comes twice"):
        read_features([tmp_path / "g.npz", tmp_path / "h.npz"])


def test_whole_numbers_are_features_too(tmp_path):
    """What a quantised model gives."""
    numbers = np.random.default_rng(0).integers(-128, 128, (5, 4), np.int8)
    np.savez(tmp_path / "f.npz", features=numbers, ids=np.array([*"abcde"]))
    found = read_features([tmp_path / "f.npz"]).vectors
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, numbers)


def test_files_are_read_one_at_a_time(tmp_path):
    """A later one is not opened before it is asked for."""
    good, _ = models()
    first = write_npz(tmp_path / "a.npz", good)
    parts = backfill_lib.shards([first, tmp_path / "missing.npz"])
    assert next(parts).ids == good.ids
    with pytest.raises(UserError, match="missing"):
        next(parts)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    """Cut, changed, empty, another format: NumPy raises something else for each."""
    good, _ = models()
    np.savez_compressed(tmp_path / "z.npz", features=good.vectors, ids=np.array(good.ids))
    np.save(tmp_path / "one.npy", good.vectors)
    whole = (tmp_path / "z.npz").read_bytes()
    changed = bytearray(whole)
    changed[120:124] = b"\xff\x00\xff\x55"
    parts = {"empty": b"", "cut": whole[: len(whole) // 2], "changed": bytes(changed)}
    archive(tmp_path / "huge.npz", TERABYTES, TERABYTES)
    for name, body in parts.items():
        (tmp_path / f"{name}.npz").write_bytes(body)
    for name in (*(f"{part}.npz" for part in parts), "huge.npz", "one.npy", "missing.npz"):
        with pytest.raises(UserError, match=rf"{name}: no features and ids in it") as error:
            read_features([tmp_path / name])
        assert "\n" not in str(error.value)


def test_a_checksum_tells_every_difference():
    old, new = models()
    one = expected([(old, "v1")])
    vectors = old.vectors.copy()
    vectors[3, 3] = np.nextafter(vectors[3, 3], 9) + 0.01
    shuffled = np.random.default_rng(0).permutation(60)
    same = old._replace(ids=[old.ids[i] for i in shuffled], vectors=old.vectors[shuffled])
    assert expected([(same, "v1")]) == one
    swapped = [*old.ids[:-2], old.ids[-1], old.ids[-2]]
    for other in (
        expected([(old, "v2")]),
        expected([(new, "v1")]),
        expected([(old._replace(vectors=vectors), "v1")]),
        expected([(old._replace(ids=swapped), "v1")]),
    ):
        assert other.checksum != one.checksum


FILLER = """
import sys
from pathlib import Path
from m2jax.tasks.retrieval.backfill import backfill, read_features
from m2jax.tasks.retrieval.store import Store
with Store(sys.argv[1]) as store:
    features = read_features([Path(sys.argv[2])])
    store.create(features.vectors.shape[1])
    backfill(store, features, sys.argv[3], batch=20, pause=0.05,
             say=lambda done: print(done.seen, flush=True))
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(tmp_path):
    """The process that holds the embedded database is killed in the middle, three times."""
    old, new = models(n=400)
    file, uri = write_npz(tmp_path / "new.npz", new), str(tmp_path / "x.db")
    with Store(uri) as store:
        store.create(16)
        backfill(store, old, "v1")
    words = [sys.executable, "-c", FILLER, uri, str(file), "v2"]
    for batches in (3, 5, 7):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(batches):
            process.stdout.readline()
        time.sleep(0.01 * batches)
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        with Store(uri) as store:
            held = contents(store)
            assert held.items == 400
            assert held.repeated == 0
            assert held.versions["v2"] >= 20 * batches
    with Store(uri) as store:
        done = backfill(store, new, "v2")
        assert done.passed >= 140
        assert done.added == 0
        assert contents(store) == expected([(new, "v2")])


def test_a_backfill_that_is_stopped_between_read_and_write(store, monkeypatch):
    """Stopped by an error in its third batch; nothing of that batch is there."""
    old, new = models()
    store.create(16)
    backfill(store, old, "v1")
    real, calls = store.write, []

    def failing(ids, vectors, version):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(ids, vectors, version)

    monkeypatch.setattr(store, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        backfill(store, new, "v2", batch=10)
    assert contents(store).versions == {"v1": 40, "v2": 20}
    monkeypatch.setattr(store, "write", real)
    assert backfill_lib.backfill(store, new, "v2", batch=7)[1:] == (0, 40, 20)
    assert contents(store) == expected([(new, "v2")])
