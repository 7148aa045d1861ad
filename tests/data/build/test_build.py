# SPDX-License-Identifier: Apache-2.0
"""Whole builds: what comes out, twice the same, and the same after a kill at any moment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from m2jax.config import UserError
from m2jax.data.build import manifest, pipeline, shards, stage_read, work
from m2jax.data.build.plan import Duplicates, Plan
from m2jax.data.build.readers.base import Source
from m2jax.data.build.records import decode
from m2jax.data.build.steps import Limits
from tests.data.build import collections_of as made

QUIET = []
BROKEN = "UnidentifiedImageError: cannot identify image file bytes"


def build(plan, **options):
    return pipeline.build(plan, say=QUIET.append, **options)


@pytest.fixture
def collections(tmp_path):
    """Two sources and an evaluation set, with one of each fault."""
    tars = made.tars(tmp_path / "web", range(24), per_tar=8)
    copy = made.sample(3)[0][1]
    rows = [
        {"jpg": copy, "en": made.english(3), "zh": made.chinese(3)},  # the same in another source
        {
            "jpg": made.encoded(made.picture(4, 96), "JPEG", quality=80),
            "en": made.english(4).upper() + "!",
            "zh": made.chinese(4),
        },
        {"jpg": made.encoded(made.picture(900), "WEBP"), "en": made.english(55), "zh": ""},
        {"jpg": made.encoded(made.picture(5)), "en": made.english(66), "zh": ""},  # new words
        {"jpg": b"broken", "en": made.english(77), "zh": ""},
        {"jpg": made.encoded(made.picture(78)), "en": "cat", "zh": "猫"},
        {"jpg": made.encoded(made.picture(79)), "en": made.english(901), "zh": "短"},
        {"jpg": made.encoded(made.picture(80)), "en": made.english(80), "zh": made.chinese(80)},
    ]
    table = made.parquet(tmp_path / "table" / "t.parquet", rows)
    test = [made.sample(900), [("00901.png", b""), ("00901.txt", made.english(901).encode())]]
    test = [test[0], [("00901.png", made.encoded(made.picture(901))), test[1][1]]]
    tests = made.write_tar(tmp_path / "test" / "0.tar", [m for one in test for m in one])
    return (
        Source("web", "tars", tars, licence="CC-BY-4.0"),
        Source("own", "parquet", (table,), language="en"),
        Source("test", "tars", (tests,), evaluation=True),
    )


def plan(out, sources, **options):
    return Plan(out, sources, **{"shard_records": 10, **options})


def read(out):
    """All records of a build in the order of its shards."""
    found = []
    for shard in manifest.read(out)["shards"]:
        reader = work.Reader(out / shard["file"])
        found += [decode(data, "") for data in reader.at(list(range(len(reader))))]
    return found


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def aside(out, source):
    lines = (out / "set_aside" / f"{source}.jsonl").read_text("utf-8").splitlines()
    return [(row["key"], row["reason"], row["detail"]) for row in map(json.loads, lines)]


def test_what_comes_out(tmp_path, collections):
    out = tmp_path / "out"
    found = build(plan(out, collections))
    records = read(out)
    kept = [f"web/{8 * (n // 8):05d}.tar#{n:05d}" for n in range(24)]
    kept += ["own/t.parquet#0.3", "own/t.parquet#1.3"]
    assert sorted(r.key for r in records) == sorted(kept)
    assert [r.key for r in records] != sorted(r.key for r in records)  # shuffled
    assert {r.key.split("/")[0]: r.licence for r in records} == {
        "web": "CC-BY-4.0",
        "own": "unknown",
    }
    (one,) = (r for r in records if r.key.endswith("#00002"))
    assert [(c.text, c.language) for c in one.captions] == [
        (made.chinese(2), "zh"),
        (made.english(2), "en"),
    ]
    assert (one.image, one.url) == (made.sample(2)[0][1], "u2")
    assert aside(out, "web") == []
    assert aside(out, "own") == [  # by unit: the table has two groups of rows
        ("own/t.parquet#0.0", "exact duplicate", "of web/00000.tar#00003"),
        ("own/t.parquet#0.1", "near duplicate", "of web/00000.tar#00004"),
        ("own/t.parquet#0.2", "evaluation image", "of test/0.tar#00900"),
        ("own/t.parquet#1.0", "undecodable image", BROKEN),
        ("own/t.parquet#1.1", "text too short", "'猫'"),
        ("own/t.parquet#1.2", "caption: text too short", "'短'"),
        ("own/t.parquet#1.2", "evaluation text", "of test/0.tar#00901"),
    ]
    assert found == manifest.read(out)
    assert found["records"] == 26
    assert found["counts"] == {
        "read": 32,
        "undecodable image": 1,
        "text too short": 1,
        "caption: text too short": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
        "evaluation image": 1,
        "evaluation text": 1,
    }
    assert [s["counts"].get("read") for s in found["sources"]] == [24, 8, 2]
    assert len(found["shards"]) == 3
    assert min(shard["records"] for shard in found["shards"]) > 1
    for stated in (*found["shards"], *found["set_aside"]):
        assert work.sha256(out / stated["file"]) == stated["sha256"]
    assert not (out / ".work").exists()
    assert "read" in manifest.summary(found)


def test_tfds_reads_the_shards(tmp_path, collections):
    build(plan(tmp_path / "out", collections))
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    rows = builder.as_data_source(split="train")
    assert len(rows) == 26
    for row, record in zip(rows, read(tmp_path / "out"), strict=True):
        assert row["key"].decode() == record.key
        assert row["image"].shape[-1] == 3
        assert [c.decode() for c in row["caption"]] == [c.text for c in record.captions]


def test_two_builds_are_the_same_bytes_and_a_done_one_is_left_alone(tmp_path, collections):
    one, two = tmp_path / "one", tmp_path / "two"
    first = build(plan(one, collections))
    # Passes and the order of work are no part of the result.
    other = plan(two, collections, duplicates=Duplicates(pass_records=7))
    assert build(other) == first
    assert files(one) == files(two)
    before = {p: p.stat().st_mtime_ns for p in one.rglob("*")}
    (one / ".work").mkdir()  # as a kill in the last moment leaves it
    assert build(plan(one, collections)) == first
    assert {p: p.stat().st_mtime_ns for p in one.rglob("*")} == before
    web, own, test = collections
    others = [web._replace(weight=2.0), web._replace(licence="MIT"), web._replace(language="zh")]
    changed = [plan(one, collections, seed=1)]
    changed += [plan(one, (other, own, test)) for other in others]
    for another in changed:
        with pytest.raises(UserError, match="holds another build, with other settings or inputs"):
            build(another)
    os.utime(web.files[0], (1, 1))
    with pytest.raises(UserError, match="holds another build"):
        build(plan(one, collections))
    assert files(one) == files(two)


def test_the_flag_of_the_language_changes_what_is_kept(tmp_path):
    german = "Ein Hund sitzt auf der Bank"
    members = [("0.png", made.encoded(made.picture(0))), ("0.txt", german.encode())]
    source = Source("a", "tars", (made.write_tar(tmp_path / "a.tar", members),))
    assert build(plan(tmp_path / "none", (source,)))["counts"] == {"read": 1, "language": 1}
    build(plan(tmp_path / "en", (source._replace(language="en"),)))
    (record,) = read(tmp_path / "en")
    assert [(c.text, c.language) for c in record.captions] == [(german, "en")]
    with pytest.raises(UserError, match="--language a=de: only en and zh are kept"):
        build(plan(tmp_path / "de", (source._replace(language="de"),)))


SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("read", "list")]


@pytest.mark.parametrize("moment", ["duplicates", "shards", "rename", *SLOW])
def test_a_build_that_breaks_off_goes_on_to_the_same_bytes(
    tmp_path, collections, moment, monkeypatch
):
    """Fails at the second piece of a stage, and half-way through the last renames."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(plan(whole, collections))
    calls = []

    def failing(real):
        def once(*args, **options):
            calls.append(args)
            if len(calls) == 2:
                raise OSError("no space left on device")
            return real(*args, **options)

        return once

    where, name = {
        "read": (stage_read, "_fill"),
        "duplicates": (pipeline.duplicates, "chosen"),
        "list": (shards, "_list"),
        "shards": (shards, "_rows"),
        "rename": (Path, "replace"),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(getattr(where, name)))
        with pytest.raises(OSError, match="no space"):
            build(plan(broken, collections))
    assert not (broken / manifest.MANIFEST).exists()
    done = {p: p.stat().st_mtime_ns for p in (broken / ".work" / "read").glob("*/counts.json")}
    build(plan(broken, collections), beam_options=[])
    assert files(broken) == files(whole)
    assert len(calls) == 2
    assert done or moment == "read"


def test_passes_may_change_after_a_break(tmp_path, collections, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(plan(whole, collections))
    with monkeypatch.context() as patch:
        real = pipeline.duplicates.find

        def find(beam, plan, units, part, parts):
            if part == 2:
                raise OSError("full")
            real(beam, plan, units, part, parts)

        patch.setattr(pipeline.duplicates, "find", find)
        with pytest.raises(OSError, match="full"):
            build(plan(broken, collections, duplicates=Duplicates(pass_records=9)))
    build(plan(broken, collections, duplicates=Duplicates(pass_records=17)))
    assert files(broken) == files(whole)


@pytest.mark.slow
def test_a_killed_process_leaves_a_build_that_goes_on(tmp_path, collections):
    """SIGKILL as soon as a folder of each stage is there."""
    whole = tmp_path / "whole"
    build(plan(whole, collections))
    words = [sys.executable, "-m", "m2jax", "data", "build", "shards", "--shard-records", "10"]
    words += ["--source", f"web=tars:{tmp_path}/web/*.tar", "--licence", "web=CC-BY-4.0"]
    words += ["--source", f"own=parquet:{tmp_path}/table/t.parquet", "--language", "own=en"]
    words += ["--evaluation", f"test=tars:{tmp_path}/test/*.tar", "--out", str(tmp_path / "out")]
    for stage in ("read", "list", "shards"):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder = tmp_path / "out" / ".work" / stage
        while process.poll() is None and not list(folder.glob("[!.]*")):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(whole)


def test_half_a_build_of_something_else_is_refused(tmp_path, collections, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_rows", lambda *args: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            build(plan(out, collections))
    with pytest.raises(UserError, match="half of a build with other settings or inputs"):
        build(plan(out, collections, limits=Limits(min_text=6)))
    file = collections[0].files[0]
    os.utime(file, (1, 1))  # the input changed
    with pytest.raises(UserError, match="half of a build"):
        build(plan(out, collections))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        build(plan(tmp_path / "full", collections))
    assert (tmp_path / "full" / "x").read_text() == "mine"


@pytest.mark.parametrize(("weight", "least", "most"), [(0.5, 3, 21), (2.0, 48, 48), (1.5, 26, 46)])
def test_weights_copy_and_thin_by_lot(tmp_path, collections, weight, least, most):
    out = tmp_path / "out"
    web = collections[0]._replace(weight=weight)
    found = build(plan(out, (web,)))
    keys = [record.key for record in read(out)]
    assert least <= len(keys) <= most
    assert found["records"] == len(keys)
    counts = found["counts"]
    assert len(keys) == 24 - counts.get("thinned by weight", 0) + counts.get("copies by weight", 0)
    if weight > 1:
        assert set(keys) == {record.key for record in read(out)}
        assert len(set(keys)) == 24


def test_a_corrupt_file_is_set_aside_and_the_rest_built(tmp_path, collections):
    file = collections[0].files[1]
    file.write_bytes(file.read_bytes()[:700])
    found = build(plan(tmp_path / "out", collections[:1]))
    assert found["records"] == 16
    assert found["counts"]["damaged file"] == 1
    assert ("web/00008.tar", "damaged file") in [row[:2] for row in aside(tmp_path / "out", "web")]


def test_nothing_left_is_an_empty_data_set(tmp_path):
    file = made.write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.txt", b"y")])
    found = build(plan(tmp_path / "out", (Source("a", "tars", (file,)),)))
    assert found["records"] == 0
    assert read(tmp_path / "out") == []


def test_names_and_texts_that_are_no_unicode(tmp_path):
    (image, *_) = made.sample(1)
    members = [
        ("caf\udce9.png", image[1]),
        ("caf\udce9.json", b'{"en": "half of a pair \\ud83d in a caption"}'),
    ]
    file = made.write_tar(tmp_path / "a.tar", members)
    build(plan(tmp_path / "out", (Source("a", "tars", (file,)),)))
    (record,) = read(tmp_path / "out")
    assert record.key == "a/a.tar#caf?"
    assert record.captions[0].text == "half of a pair ? in a caption"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "--source: none given"),
        ({"limits": Limits(aspect=0.5)}, "--aspect 0.5: must lie between 1.0"),
        ({"limits": Limits(script="latin")}, "--script latin: unknown: use one of simplified"),
        ({"duplicates": Duplicates(near="all")}, "--near all: unknown"),
        ({"duplicates": Duplicates(jaccard=2)}, "--jaccard 2: must lie between"),
        ({"shard_records": 0}, "--shard-records 0: must lie between"),
    ],
)
def test_plans_that_cannot_be(tmp_path, collections, change, message):
    with pytest.raises(UserError, match=message):
        build(plan(tmp_path / "out", **{"sources": collections, **change}))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_refused_leaves_nothing_behind(tmp_path):
    table = made.parquet(tmp_path / "t.parquet", [{"a": 1}])
    with pytest.raises(UserError, match="needs one of"):
        build(plan(tmp_path / "out", (Source("t", "parquet", (table,)),)))
    assert not (tmp_path / "out").exists()


def test_two_sources_of_one_name_and_only_tests(tmp_path, collections):
    with pytest.raises(UserError, match="two are equal"):
        build(plan(tmp_path / "out", (collections[0], collections[0])))
    with pytest.raises(UserError, match="none given"):
        build(plan(tmp_path / "out", collections[2:]))
