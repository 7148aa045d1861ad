# SPDX-License-Identifier: Apache-2.0
"""Every kind of collection, whole and damaged: what is there is read, what is not is named."""

import base64
import json
import os
import pickle
import tarfile

import pytest

from m2jax.config import UserError
from m2jax.data.build import readers
from m2jax.data.build.readers import base, tsv64
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Rejected
from tests.data.build import collections_of as made


def read(kind, file, language="en"):
    """All units of a file."""
    reader, source = readers.reader(kind), Source("s", kind, (file,), language=language)
    units = [Unit(0, n, file, dict(span)) for n, span in enumerate(reader.units(file))]
    return [found for unit in units for found in reader.read(unit, source)]


def good(found):
    return [one for one in found if isinstance(one, Sample)]


def reasons(found):
    return [(one.key, one.reason) for one in found if isinstance(one, Rejected)]


def texts(one):
    return [(caption.text, caption.language) for caption in one.captions]


def test_tars_as_img2dataset_writes_them(tmp_path):
    (file,) = made.tars(tmp_path, range(3))
    found = read("tars", file, language="")
    assert [one.key for one in found] == [f"00000.tar#{n:05d}" for n in range(3)]
    assert [one.url for one in found] == ["u0", "u1", "u2"]
    assert found[2].image == made.encoded(made.picture(2))
    # The caption stands in the .txt and in the .json: once is enough; other fields are no captions.
    assert texts(found[2]) == [(made.chinese(2), "zh"), (made.english(2), "")]


def test_a_cut_tar_gives_what_lies_before_the_cut(tmp_path):
    (file,) = made.tars(tmp_path, range(4))
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-2]  # a .txt of the last sample
    file.write_bytes(whole[: last.offset_data + 3])
    found = read("tars", file)
    assert [one.key for one in good(found)] == [f"00000.tar#{n:05d}" for n in range(3)] + [
        "00000.tar#00003"
    ]
    assert reasons(found) == [("00000.tar", "damaged file")]
    file.write_bytes(whole[: last.offset])  # at the border of a member: tarfile sees no fault
    assert reasons(read("tars", file)) == [("00000.tar", "damaged file")]
    file.write_bytes(b"\x1f\x8b compressed, or anything")
    assert reasons(read("tars", file)) == [("00000.tar", "damaged file")]


def test_hostile_tars_are_refused_member_by_member(tmp_path):
    link = tarfile.TarInfo("00002.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("00003.png")
    device.type = tarfile.CHRTYPE
    members = [
        ("../../evil.png", b"x"),
        ("/root/evil.png", b"x"),
        ("a/../../evil.txt", b"x"),
        (link, b""),
        (device, b""),
        *made.sample(5),
    ]
    found = read("tars", made.write_tar(tmp_path / "h.tar", members))
    assert [one.key for one in good(found)] == ["h.tar#00005"]
    assert reasons(found) == [
        ("h.tar#../../evil.png", "path outside"),
        ("h.tar#/root/evil.png", "path outside"),
        ("h.tar#a/../../evil.txt", "path outside"),
        ("h.tar#00002.png", "link or device"),
        ("h.tar#00003.png", "link or device"),
    ]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["h.tar"]  # nothing was unpacked


def test_members_that_do_not_fit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TEXT_BYTES", 50)
    members = [
        ("a.txt", b"no image here"),
        *made.sample(1)[:1],
        ("00001.txt", b"caf\xe9"),
        ("00001.zh.txt", "一只猫在这里".encode()),
        ("b.png", b"p"),
        ("b.json", b"[1, 2"),
        ("c.png", b"p"),
        ("c.json", b"[" * 40),
        ("d.png", b"p"),
        ("d.txt", b"x" * 51),
        ("e.PNG", b"p"),
        ("e.cls", b"3"),
    ]
    found = read("tars", made.write_tar(tmp_path / "m.tar", members))
    assert [texts(one) for one in good(found)] == [[("一只猫在这里", "zh")], [], [], [], []]
    assert reasons(found) == [
        ("m.tar#a", "missing image"),
        ("m.tar#00001", "text not UTF-8"),
        ("m.tar#b", "damaged text"),
        ("m.tar#c", "damaged text"),
        ("m.tar#d.txt", "image too large"),
    ]


def test_parquet_with_bytes_objects_and_paths(tmp_path):
    image = made.encoded(made.picture(1))
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(image)
    os.symlink("/etc/hosts", tmp_path / "pics" / "link.png")
    rows = [
        {"jpg": image, "path": None, "caption": ["one text", "two texts"], "url": "u"},
        {"jpg": None, "path": "pics/a.png", "caption": ["by path"], "url": None},
        {"jpg": None, "path": "pics/none.png", "caption": ["x"], "url": None},
        {"jpg": None, "path": "../../../etc/hosts", "caption": ["x"], "url": None},
        {"jpg": None, "path": "pics/link.png", "caption": ["x"], "url": None},
        {"jpg": None, "path": None, "caption": ["x"], "url": "http://only"},
    ]
    found = read("parquet", made.parquet(tmp_path / "t.parquet", rows))
    assert [(o.key, o.image == image, texts(o), o.url) for o in good(found)] == [
        ("t.parquet#0.0", True, [("one text", "en"), ("two texts", "en")], "u"),
        ("t.parquet#0.1", True, [("by path", "en")], ""),
    ]
    assert reasons(found) == [
        ("t.parquet#0.2", "missing image"),
        ("t.parquet#0.3", "path outside"),
        ("t.parquet#1.0", "path outside"),
        ("t.parquet#1.1", "missing image"),
    ]
    objects = [{"image": {"bytes": image, "path": None}, "zh": "一只猫", "en": b"caf\xe9"}]
    assert reasons(read("parquet", made.parquet(tmp_path / "o.parquet", objects))) == [
        ("o.parquet#0.0", "text not UTF-8")
    ]


def test_damaged_and_foreign_tables(tmp_path):
    image = made.encoded(made.picture(1))
    file = made.parquet(tmp_path / "t.parquet", [{"jpg": image, "caption": "x"}] * 9)
    data = bytearray(file.read_bytes())
    data[40:400] = bytes(360)
    file.write_bytes(data)
    found = read("parquet", file)
    assert ("t.parquet#0.0", "damaged file") in reasons(found)
    assert all(one.image == image for one in good(found))
    file.write_bytes(bytes(data[:100]))
    assert reasons(read("parquet", file)) == [("t.parquet#0.0", "damaged file")]
    with pytest.raises(UserError, match=r"t\.parquet: columns \['a'\]: needs one of"):
        read("parquet", made.parquet(file, [{"a": 1}]))
    with pytest.raises(UserError, match=r"none\.parquet"):
        read("parquet", tmp_path / "none.parquet")


def test_chinese_clips_tables(tmp_path, monkeypatch):
    images = {n: made.encoded(made.picture(n)) for n in range(5)}
    lines = [
        {"text_id": 1, "text": "第一只猫", "image_ids": [0, 3]},
        {"text_id": 2, "text": "second cat", "image_ids": [3]},
        b"{broken",
        {"text_id": 3, "image_ids": [1]},
        b'{"text_id": 4, "text": "\xff", "image_ids": [1]}',
    ]
    file = made.tsv64(tmp_path, images.items(), lines)
    with file.open("ab") as out:
        out.write(b"no tab\n7\t!!notbase64\n")
    expected_bad = [
        ("all_texts.jsonl#line 3", "damaged text"),
        ("all_texts.jsonl#line 4", "damaged text"),
        ("all_texts.jsonl#line 5", "text not UTF-8"),
        (f"all_imgs.tsv#byte {file.read_bytes().index(b'no tab')}", "damaged row"),
        ("all_imgs.tsv#7", "damaged row"),
    ]
    whole = read("tsv64", file, language="zh")
    assert [one.image for one in good(whole)] == list(images.values())
    assert texts(good(whole)[3]) == [("第一只猫", "zh"), ("second cat", "zh")]
    assert reasons(whole) == expected_bad
    for size in (1, 7, 100, 5000):  # wherever the units are cut, each line is read once
        monkeypatch.setattr(tsv64, "UNIT_BYTES", size)
        assert read("tsv64", file, language="zh") == whole
    monkeypatch.setattr(base, "TEXT_BYTES", 60)
    made.tsv64(tmp_path, [], [b'{"text": "' + b"x" * 500 + b'"}', lines[1]])
    assert reasons(read("tsv64", file)) == []  # no image, no unit
    made.tsv64(tmp_path, [(3, images[3])], [b'{"text": "' + b"x" * 500 + b'"}', lines[1]])
    found = read("tsv64", file)
    assert reasons(found) == [("all_texts.jsonl#line 1", "damaged text")]
    assert texts(found[-1]) == [("second cat", "en")]
    (tmp_path / "all_texts.jsonl").unlink()
    with pytest.raises(UserError, match=r"all_texts\.jsonl: no such file"):
        read("tsv64", file)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/m2jax-pwned",)


def test_lmdb_pairs_and_hostile_pickles(tmp_path):
    image = made.encoded(made.picture(0))
    pairs = [
        (0, 10, "a red cat"),
        pickle.dumps(Evil()),
        (1, 11, "no such image"),
        (0, 12),
        b"\x80\x05]" + b"\x94" * 3,
        ("0", 13, "第二句话"),
        (2, 14, "no base64"),
        b"",
    ]
    images = {0: base64.b64encode(image), 2: b"!!"}
    folder = made.lmdb_pairs(tmp_path / "split", pairs, images)
    found = read("lmdb", folder)
    assert [(o.key, o.image == image, texts(o)) for o in good(found)] == [
        ("split#0", True, [("a red cat", "en")]),
        ("split#5", True, [("第二句话", "en")]),
    ]
    bad = {key: reason for key, reason in reasons(found)}
    assert bad.pop("split#2") == "missing image"
    assert bad == {f"split#{n}": "damaged row" for n in (1, 3, 4, 6, 7)}
    assert not os.path.exists("/tmp/m2jax-pwned")
    with pytest.raises(UserError, match=r"nowhere/pairs: no data\.mdb"):
        read("lmdb", tmp_path / "nowhere")


def test_coco_captions(tmp_path):
    image = made.encoded(made.picture(0), "JPEG")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(image)
    images = [
        {"id": 7, "file_name": "1.jpg", "coco_url": "u"},
        {"id": 8, "file_name": "2.jpg"},
        {"id": 9, "file_name": "../x.jpg"},
        {"id": [1]},
        "row",
    ]
    annotations = [
        {"image_id": 7, "caption": "first"},
        {"image_id": 7, "caption": "second"},
        {"image_id": 99, "caption": "of no image"},
        {"image_id": 7},
    ]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = read("coco", file)
    assert [(o.key, texts(o), o.url) for o in good(found)] == [
        ("c.json#0", [("first", "en"), ("second", "en")], "u")
    ]
    assert reasons(found) == [
        ("c.json#annotation 3", "damaged text"),
        ("c.json#1", "missing image"),
        ("c.json#2", "path outside"),
        ("c.json#3", "damaged row"),
        ("c.json#4", "damaged row"),
    ]
    for text in ("[]", "{", '{"images": 1, "annotations": []}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"c\.json: no COCO captions"):
            read("coco", file)


def test_an_unknown_kind_and_a_missing_library_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="kind 'zip' is unknown: use one of tars, parquet"):
        readers.reader("zip")
    monkeypatch.setitem(readers.KINDS, "lmdb", ("no_such_module", "X"))
    with pytest.raises(UserError, match=r"needs .*no_such_module: pip install"):
        readers.reader("lmdb")
