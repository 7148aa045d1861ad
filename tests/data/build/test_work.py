# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole, names that stay inside, plans that know their inputs, and manifests."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.data.build import manifest, plan, shards, stage_read, work
from m2jax.data.build.plan import Duplicates, Plan, Scoring
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Source
from m2jax.data.build.steps import Limits
from tests.data.build import collections_of as made


def test_a_folder_has_its_name_when_it_is_full_and_not_before(tmp_path):
    place = tmp_path / "a" / "unit"

    def fail():
        with work.folder(place) as inside:
            (inside / "x").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    with work.folder(place) as inside:
        (inside / "x").write_text("whole")
        assert not place.exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["unit"]


def test_of_two_workers_on_one_unit_the_first_to_end_is_taken(tmp_path):
    place = tmp_path / "unit"
    with work.folder(place) as slow:
        (slow / "x").write_text("slow")
        with work.folder(place) as quick:
            (quick / "x").write_text("quick")
    assert (place / "x").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [place]


def test_records_arrays_and_values_come_back(tmp_path):
    rows = [os.urandom(n) for n in (1, 1000, 3, 70_000)]
    with work.records(tmp_path / "r") as out:
        for row in rows:
            out.write(row)
    reader = work.Reader(tmp_path / "r")
    assert len(reader) == 4
    assert reader.at([3, 0, 2]) == [rows[3], rows[0], rows[2]]
    assert reader.at([]) == []
    reader.close()
    work.write_arrays(tmp_path / "a", x=np.arange(3), y=np.zeros((0, 2), np.uint8))
    found = work.read_arrays(tmp_path / "a")
    assert (found["x"].tolist(), found["y"].shape) == ([0, 1, 2], (0, 2))
    work.write_json(tmp_path / "j", {"b": 1, "a": "猫"})
    assert work.read_json(tmp_path / "j") == {"a": "猫", "b": 1}
    with pytest.raises(UserError, match=r"unreadable .*: start the build anew"):
        work.Reader(tmp_path / "nowhere")
    data = (tmp_path / "r").read_bytes()
    (tmp_path / "r").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="records of 4"):
        work.Reader(tmp_path / "r", 4)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(0, 3))
def test_no_name_leads_out_of_a_folder(name, ups):
    folder = Path("/srv/pictures")
    for one in (name, "../" * ups + name, "a/" + "../" * ups + name, "/" * ups + name):
        found = base.inside(folder, one)
        assert found is None or found.is_relative_to(folder)
    assert base.inside(folder, "a/../b.jpg") == folder / "b.jpg"


def test_a_large_image_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"x" * 11)
    monkeypatch.setattr(base, "IMAGE_BYTES", 10)
    assert base.image_file(tmp_path, "a.jpg", "k").reason == "image too large"
    assert base.image_file(tmp_path, "", "k").reason == "missing image"  # the folder itself


def test_a_fingerprint_is_of_settings_and_inputs_alone(tmp_path):
    source = Source("a", "tars", made.tars(tmp_path, range(2)))
    one = Plan(tmp_path / "out", (source,))
    mark = plan.fingerprint(one)
    same = dataclasses.replace(
        one,
        out=tmp_path / "other",
        duplicates=Duplicates(pass_records=3),
        scoring=Scoring(batch=7),
    )
    assert plan.fingerprint(same) == mark
    changes = [
        {"limits": Limits(aspect=2.0)},
        {"duplicates": Duplicates(jaccard=0.8)},
        {"scoring": Scoring(below=0.2)},
        {"seed": 1},
        {"shard_records": 3},
        {"sources": (source._replace(weight=2.0),)},
        {"sources": (source._replace(licence="CC0"),)},
    ]
    marks = {plan.fingerprint(dataclasses.replace(one, **change)) for change in changes}
    assert len(marks | {mark}) == len(changes) + 1
    source.files[0].write_bytes(source.files[0].read_bytes() + bytes(1024))
    assert plan.fingerprint(one) != mark


def test_a_fingerprint_knows_the_texts_beside_the_images(tmp_path):
    source = Source("a", "tsv64", (made.tsv64(tmp_path, [(0, b"x")], [b"{}"]),))
    before = plan.fingerprint(Plan(tmp_path / "out", (source,)))
    made.tsv64(tmp_path, [], [b"{ }"])
    (tmp_path / "all_imgs.tsv").touch()
    os.utime(tmp_path / "all_texts.jsonl", (1, 1))
    one = plan.fingerprint(Plan(tmp_path / "out", (source,)))
    os.utime(tmp_path / "all_texts.jsonl", (9**10, 9**10))
    assert len({before, one, plan.fingerprint(Plan(tmp_path / "out", (source,)))}) == 3


def test_evaluation_comes_first_whatever_the_order(tmp_path):
    tars = made.tars(tmp_path, range(4), per_tar=2)
    sources = (
        Source("a", "tars", tars),
        Source("t", "tars", tars[:1], evaluation=True),
    )
    found = plan.units(Plan(tmp_path / "out", sources))
    assert [(u.source, u.number, u.file) for u in found] == [
        (1, 0, tars[0]),
        (0, 0, tars[0]),
        (0, 1, tars[1]),
    ]


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_hashes_fall_into_one_shard_each(count, seed):
    """The stretches of the hashes that ``_rows`` takes cover them all, without overlap."""
    hashes = np.sort(np.random.default_rng(seed).integers(0, 2**64, 200, np.uint64))
    ends = [-(-(i << 64) // count) for i in range(count + 1)]
    places = [np.searchsorted(hashes, np.uint64(end)) for end in ends[:-1]] + [200]
    assert places[0] == 0
    assert np.diff(places).min() >= 0
    assert shards.file_name(0, count).endswith(f"00000-of-{count:05d}")


@given(st.floats(0, 5), st.integers(0, 2**16))
def test_copies_are_the_weight_on_average(weight, seed):
    copies = [stage_read.copies(seed, f"k{n}", weight) for n in range(300)]
    assert set(copies) <= {int(weight), int(weight) + 1}
    assert abs(np.mean(copies) - weight) < 5 * 0.5 / 300**0.5


def test_a_damaged_manifest_is_one_line(tmp_path):
    for text in (None, "{", "[]", '{"shards": 1, "records": 2}', "{}"):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: .*: build the shards again"):
            manifest.read(tmp_path)


def test_the_summary_lists_the_most_frequent_reason_first():
    counts = {"read": 12000, "low score": 5, "language": 70, "captions rewritten": 9}
    text = manifest.summary({"counts": counts, "records": 11925})
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "read 12,000",
        "- language 70",
        "- low score 5",
        "+ captions rewritten 9",
        "records 11,925",
    ]
