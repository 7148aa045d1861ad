# SPDX-License-Identifier: Apache-2.0
"""One bad row, header or image costs itself alone, and says so."""

import base64
import contextlib
import io
import json
import pickle
import re
import sqlite3
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.data.build import manifest, readers, signatures, stage_read
from m2jax.data.build.plan import Duplicates
from m2jax.data.build.readers import base, parquet, tsv64
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected
from tests.data.build import collections_of as made
from tests.data.build.test_build import build, plan, read
from tests.data.build.test_readers import good, reasons, texts
from tests.data.build.test_readers import read as read_source
from tests.data.build.test_steps import chunk, outcome, record

PALETTE_WITHOUT_COLOURS = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", bytes([0, 0, 0, 40, 0, 0, 0, 40, 8, 3, 0, 0, 0]))
    + chunk(b"IDAT", zlib.compress(bytes(41 * 40)))
    + chunk(b"IEND", b"")
)


def sums_up(counts, records, copies="copies by weight"):
    """read - reasons + copies = records."""
    beside = ("read", copies, "captions rewritten")
    gone = sum(n for k, n in counts.items() if k not in beside and not k.startswith("caption: "))
    return counts["read"] - gone + counts.get(copies, 0) == records


def test_records_without_text_are_like_none():
    nothing = signatures.minhash(())
    marks = signatures.minhash((Caption("!?"),))
    said = signatures.minhash((Caption("a red cat"),))
    np.testing.assert_array_equal(nothing, marks)
    pairs = [(nothing, marks), (nothing, said), (said, nothing), (said, said)]
    one, other = (np.stack(side) for side in zip(*pairs, strict=True))
    assert signatures.jaccard(one, other).tolist() == [0, 0, 0, 1]


def test_an_evaluation_set_may_be_images_alone(tmp_path):
    web = made.tars(tmp_path / "web", range(4))
    shown = [(f"{n}.png", made.encoded(made.picture(n))) for n in (2, 50, 51)]
    tests = made.write_tar(tmp_path / "test.tar", shown)
    sources = (Source("web", "tars", web), Source("t", "tars", (tests,), evaluation=True))
    found = build(plan(tmp_path / "out", sources))
    assert found["counts"] == {"read": 4, "evaluation image": 1}
    assert sorted(r.key[-5:] for r in read(tmp_path / "out")) == ["00000", "00001", "00003"]


def test_lone_surrogates_in_chinese_clips_tables(tmp_path):
    lines = [
        b'{"text": "half \\ud83d of a pair", "image_ids": [0]}',
        b'{"text": "a cat", "image_ids": ["\\ud800", 0]}',
        b'{"text": "a second cat", "image_ids": [0]}',
    ]
    found = read_source("tsv64", made.tsv64(tmp_path, [(0, b"image")], lines))
    assert [texts(one) for one in good(found)] == [
        [("half ? of a pair", "en"), ("a second cat", "en")]
    ]
    assert reasons(found) == [("all_texts.jsonl#line 2", "text not UTF-8")]


def test_a_line_that_names_an_image_many_times_holds_its_text_once(tmp_path):
    line = {"text": "a red cat " * 5000, "image_ids": [0] * 500 + [*range(500)]}
    file = made.tsv64(tmp_path, [(0, b"image")], [line])
    assert [len(one.captions) for one in good(read_source("tsv64", file))] == [1]
    with contextlib.closing(sqlite3.connect("")) as index:
        tsv64._index(index, tsv64.texts_of(file))
        sizes = [index.execute(f"PRAGMA page_{x}").fetchone()[0] for x in ("count", "size")]
    assert 50_000 < sizes[0] * sizes[1] < 200_000  # 25 MB, were it written for each image


def test_file_names_that_cannot_be(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"image")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    names = ["\ud800.jpg", "x" * 5000, "loop.jpg", "a\0.jpg", "1.jpg"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"images": images, "annotations": []}))
    found = read_source("coco", file)
    assert [one.key for one in good(found)] == ["c.json#4"]
    assert [key for key, _ in reasons(found)] == [f"c.json#{n}" for n in range(4)]
    file.write_text("{}")
    with pytest.raises(UserError, match=r"c\.json: no COCO captions \(images and annotations"):
        read_source("coco", file)


MEMO_OF_4_GIB = b"\x80\x04Nr\xff\xff\xff\x0f."


def test_one_bad_pair_costs_itself_alone(tmp_path):
    bad = [
        pickle.dumps((10**5000, 1, "huge")),
        ("\ud800", 1, "surrogate"),
        ("", 1, "empty id"),
        ("x" * 3000, 1, "long id"),
        MEMO_OF_4_GIB,
        MEMO_OF_4_GIB.replace(b"r\xff\xff\xff\x0f", b"p268435455\n"),
    ]
    pairs = [(0, 1, "a red cat"), *bad, (0, 2, "a second cat")]
    folder = made.lmdb_pairs(tmp_path / "l", pairs, {0: base64.b64encode(b"image")})
    found = read_source("lmdb", folder)
    assert [one.key for one in good(found)] == ["l#0", "l#7"]
    assert dict(reasons(found)) == {
        "l#1": "damaged row",
        "l#2": "damaged row",
        "l#3": "missing image",
        "l#4": "missing image",
        "l#5": "damaged row",
        "l#6": "damaged row",
    }
    details = [one.detail for one in found if isinstance(one, Rejected)]
    assert ["numbers an object 268435455" in d for d in details] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("name", ["pairs", "imgs"])
def test_half_an_lmdb_is_one_line(tmp_path, name):
    images = {n: b"A" * 40_000 for n in range(10)}
    folder = made.lmdb_pairs(tmp_path / "l", [(n, n, "t" * 900) for n in range(100)], images)
    file = folder / name / "data.mdb"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])  # a page past the end would kill the process
    with pytest.raises(UserError, match=rf"{name}: data\.mdb is cut off: .* copy it again"):
        read_source("lmdb", folder)


def test_a_bad_header_in_a_tar_is_told(tmp_path):
    (file,) = made.tars(tmp_path, range(6))
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        fifth = tar.getmembers()[4].offset
    zeroed = bytes(data[:fifth]) + bytes(512) + bytes(data[fifth + 512 :])
    data[fifth + 3] ^= 1
    for damaged in (bytes(data), zeroed):
        file.write_bytes(damaged)
        found = read_source("tars", file)
        assert [one.key for one in good(found)] == ["00000.tar#00000", "00000.tar#00001"]
        assert reasons(found) == [("00000.tar", "damaged file")]
        assert getattr(found[-1], "detail", "") == f"bad header at byte {fifth}: the rest is lost"


def test_a_palette_without_colours_is_no_image():
    assert outcome(record(PALETTE_WITHOUT_COLOURS)) == ["undecodable image"]


def test_a_jpeg_with_a_second_picture_behind_passes():
    data = made.encoded(made.picture(1), "MPO", save_all=True, append_images=[made.picture(2)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert outcome(record(data)) == ["kept"]


def test_other_parsers_never_see_the_bytes(monkeypatch):
    calls = []
    Image.init()
    monkeypatch.setitem(Image.OPEN, "PPM", (lambda *_: calls.append("PPM"), None))
    assert outcome(record(b"P6 40 40 255 " + bytes(4800))) == ["undecodable image"]
    assert calls == []


def test_whatever_a_record_raises_the_others_are_built(tmp_path, monkeypatch):
    web = made.tars(tmp_path / "web", range(4))
    real, calls = signatures.perceptual_hash, []

    def failing(image):
        calls.append(image)
        if len(calls) == 2:
            raise AssertionError("a corner of the library")
        return real(image)

    monkeypatch.setattr(stage_read.signatures, "perceptual_hash", failing)
    found = build(plan(tmp_path / "out", (Source("web", "tars", web),)))
    assert found["counts"] == {"read": 4, "undecodable image": 1}
    text = (tmp_path / "out" / "set_aside" / "web.jsonl").read_text()
    assert re.search("#00001.*AssertionError: a corner of the library", text)
    assert len(read(tmp_path / "out")) == 3


def test_the_counts_add_up_whatever_was_lost(tmp_path):
    tars = made.tars(tmp_path / "web", range(24), per_tar=8)
    tars[1].write_bytes(tars[1].read_bytes()[:7000])
    members = [("a.txt", b"no image"), ("../b.png", b"x"), ("c.png", b"x"), *made.sample(3)]
    other = made.write_tar(tmp_path / "other.tar", members)
    source = Source("web", "tars", (*tars, other), weight=1.5)
    for weight in (1.5, 0.5):
        out = tmp_path / f"out{weight}"
        found = build(plan(out, (source._replace(weight=weight),)))
        assert found["counts"]["damaged file"] == 1
        assert sums_up(found["counts"], found["records"])
        assert found["records"] == len(read(out)) == manifest.read(out)["records"]


def test_what_is_thinned_away_takes_no_other_with_it(tmp_path):
    tars = made.tars(tmp_path / "web", range(8))
    one = Source("a", "tars", tars, weight=0.0)
    found = build(plan(tmp_path / "out", (one, one._replace(name="b", weight=1.0))))
    assert {r.source for r in read(tmp_path / "out")} == {"b"}
    assert found["counts"] == {"read": 16, "thinned by weight": 8}


def test_files_of_one_name_have_keys_of_their_own(tmp_path):
    files = [made.tars(tmp_path / folder, range(3))[0] for folder in ("a", "b/c")]
    source = Source("web", "tars", tuple(files))
    found = build(plan(tmp_path / "out", (source,), duplicates=Duplicates(near="none")))
    keys = [f"web/{folder}/00000.tar#{n:05d}" for folder in ("a", "b/c") for n in range(3)]
    text = (tmp_path / "out" / "set_aside" / "web.jsonl").read_text()
    gone = [json.loads(line)["key"] for line in text.splitlines()]
    assert sorted([*gone, *(r.key for r in read(tmp_path / "out"))]) == keys
    assert found["sources"][0]["files"] == ["a/00000.tar", "b/c/00000.tar"]


def test_many_rows_of_one_large_value_are_read_one_by_one(tmp_path):
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(2**22)]))
    file = tmp_path / "t.parquet"
    table = pa.table({"jpg": image, "caption": ["a red cat"] * 64})
    pq.write_table(table, file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 1000
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        reader, source = readers.reader("parquet"), Source("s", "parquet", (file,))
        for one in reader.read(Unit(0, 0, file, {"group": 0}), source):
            assert isinstance(one, Sample)
            assert len(one.image) == 2**22
    finally:
        pa.set_memory_pool(default)
    assert 2**22 < pool.max_memory() < 2**26  # 64 copies are 2**28


def test_rows_and_texts_that_are_too_large(tmp_path, monkeypatch):
    rows = [{"jpg": b"x" * n, "caption": "y" * m} for n, m in ((9, 9), (90, 9), (9, 30))]
    file = made.parquet(tmp_path / "t.parquet", rows)
    monkeypatch.setattr(parquet, "ROW_BYTES", 80)
    monkeypatch.setattr(base, "TEXT_BYTES", 20)
    found = read_source("parquet", file)
    assert [one.key for one in good(found)] == ["t.parquet#0.0"]
    assert reasons(found) == [
        ("t.parquet#0.1", "image too large"),
        ("t.parquet#0.2", "text too long"),
    ]


def test_a_chinese_caption_of_usual_length_is_kept_out(tmp_path):
    shared = "一位老人坐在公园的长椅上喂鸽子和几只小麻雀"
    assert len(shared) == 21
    short = "一位老人坐在公园里"  # 27 letters' worth: chance
    members = [m for n, text in ((1, shared), (2, short)) for m in chinese(n, text)]
    other = [m for n, text in ((3, shared), (4, short)) for m in chinese(n, text)]
    web, test = (made.write_tar(tmp_path / f"{n}.tar", m) for n, m in enumerate((members, other)))
    sources = (Source("web", "tars", (web,)), Source("t", "tars", (test,), evaluation=True))
    found = build(plan(tmp_path / "out", sources))
    assert found["counts"] == {"read": 2, "evaluation text": 1}
    assert [r.captions[0].text for r in read(tmp_path / "out")] == [short]


def chinese(number, text):
    return [
        (f"{number}.png", made.encoded(made.picture(number))),
        (f"{number}.zh.txt", text.encode()),
    ]
