# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.tasks.retrieval.backfill import Features, read_features
from m2jax.tasks.retrieval.upgrade import judge
from tests.tasks.retrieval.databases import models, write_npz


def data_set(folder, *, new=0.3, turned=False, alone=True, seed=0):
    """Queries and gallery of 20 places by an old model, a new one and one trained alone."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    places = np.repeat(rng.normal(size=(20, 16)), 6, axis=0)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    ids = [f"p{i}" for i in range(len(places))]
    query = np.arange(len(places)) % 6 == 0
    for name, noise, turned_ in (
        ("old", 1.2, False),
        ("new", new, turned),
        ("alone", 0.25, True),
    ):
        if name == "alone" and not alone:
            continue
        vectors = places + noise * rng.normal(size=places.shape)
        vectors = (vectors @ turn if turned_ else vectors).astype(np.float32)
        for side, rows in (("queries", query), ("gallery", ~query)):
            which = rng.permutation(np.flatnonzero(rows))  # ids say which is which
            found = Features([ids[i] for i in which], vectors[which])
            write_npz(folder / f"{name}_{side}.npz", found)
    right = {ids[i]: [ids[i + j] for j in range(1, 6)] for i in np.flatnonzero(query)}
    (folder / "truth.json").write_text(json.dumps({"right": right}))
    return folder


def report(capsys, *words):
    code = main(["retrieval", "upgrade-report", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_compatible_model_is_safe(tmp_path, capsys):
    a, b = (data_set(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    code, out, err = report(capsys, a, b, "--json", tmp_path / "r.json")
    assert code == 0, err
    assert "safe: the new model" in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["safe"]
    assert set(found["sets"]) == {"a", "b"}
    for each in found["sets"].values():
        assert each["old"] < each["cross"] <= each["new"]
        assert each["old"] < each["mixed"]
        assert each["metric"] == "mAP@100"
    assert 50 < found["scores"]["p_comp"] < 100


def test_a_model_of_another_space_is_not(tmp_path, capsys):
    """Good by itself, but its vectors mean nothing to the stored ones: exit 5."""
    folder = data_set(tmp_path / "a", turned=True, alone=False)
    code, out, _ = report(capsys, folder, "--json", tmp_path / "r.json")
    assert code == 5
    assert "cross-test" in out
    assert out.rstrip().endswith("not safe")
    found = json.loads((tmp_path / "r.json").read_text())
    assert not found["safe"]
    assert found["scores"] is None


def test_a_worse_model_is_not(tmp_path, capsys):
    code, out, _ = report(capsys, data_set(tmp_path / "a", new=2.0))
    assert code == 5
    assert "self-test" in out


def test_scores_that_cannot_be_are_told_of(tmp_path, capsys):
    one, other = data_set(tmp_path / "a"), data_set(tmp_path / "b", alone=False, seed=1)
    assert "no scores: not every set" in report(capsys, one, other)[1]
    assert "P_up" in report(capsys, one)[1]
    assert "scores" not in report(capsys, other)[1]


def test_a_margin_asks_for_more(tmp_path, capsys):
    assert report(capsys, data_set(tmp_path / "a"), "--margin", "0.9")[0] == 5


def angles(folder):
    """One query, 20 right items and 21 wrong ones, as angles: good before and after an upgrade,
    bad in its middle, where wrong items that are new stand before right ones that are old."""
    folder.mkdir()
    names = [*(f"r{i}" for i in range(20)), *(f"w{i}" for i in range(21))]
    small = 1e-3 * np.arange(41)
    old = np.where(np.arange(41) < 20, 10, 20) + small
    old[20] = 12  # w0: what the old query finds first
    new = np.where(np.arange(41) < 20, 1, 5) + small
    for model, query, gallery in (("old", 12.0, old), ("new", 0.0, new)):
        for side, ids, degrees in (("queries", ["q"], [query]), ("gallery", names, gallery)):
            turned = np.deg2rad(degrees)
            vectors = np.stack([np.cos(turned), np.sin(turned)], 1).astype(np.float32)
            write_npz(folder / f"{model}_{side}.npz", Features(ids, vectors))
    (folder / "truth.json").write_text(json.dumps({"right": {"q": names[:20]}}))
    return folder, names


def test_each_figure_is_of_its_queries_and_gallery(tmp_path):
    """The middle alone speaks against it; by old queries in the new gallery all would."""
    folder, _ = angles(tmp_path / "a")
    (found,) = judge([folder]).sets
    first_wrong = np.mean([(j + 1) / (j + 2) for j in range(20)])
    assert (found.old, found.new, found.cross) == pytest.approx((first_wrong, 1, 1))
    assert 0.7 < found.mixed < found.old
    assert [reason.split(" gives ")[0] for reason in found.against] == ["a half filled gallery"]
    (at_one,) = judge([folder], k=1).sets
    assert (at_one.old, at_one.metric) == (0, "mAP@1")


def test_the_medium_protocol(tmp_path, capsys):
    """Junk is no mistake: with the wrong item that came first in it, the old ranking is perfect."""
    folder, names = angles(tmp_path / "a")
    kinds = {"easy": names[:10], "hard": names[10:20], "junk": [names[20], *names[-5:]]}
    truth = {kind: {"q": items} for kind, items in kinds.items()}
    (folder / "truth.json").write_text(json.dumps(truth))
    code, out, _ = report(capsys, folder)
    assert code == 5
    assert "a (medium mAP): old 1.0000, new 1.0000, cross 1.0000, half filled 0." in out


def one_more(file):
    had = read_features([file])
    write_npz(file, Features([*had.ids, "more"], np.append(had.vectors, had.vectors[:1], 0)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "truth.json").unlink(), "truth.json: unreadable"),
        (lambda d: (d / "truth.json").write_text("{"), "truth.json: unreadable"),
        (lambda d: (d / "truth.json").write_text('{"wrong": {}}'), 'needs "right"'),
        (lambda d: (d / "truth.json").write_text('{"right": {"z": []}}'), "ids of queries"),
        (lambda d: (d / "truth.json").write_text('{"right": {"p0": ["z"]}}'), "gallery lacks"),
        (lambda d: (d / "truth.json").write_text('{"right": {}}'), "no query has a right item"),
        (lambda d: (d / "alone_gallery.npz").unlink(), "alone_gallery.npz: no features"),
        (lambda d: write_npz(d / "new_gallery.npz", models()[0]), "other ids than the old"),
        (lambda d: one_more(d / "new_gallery.npz"), "new_gallery.npz: other ids than the old"),
    ],
)
def test_folders_that_cannot_be(tmp_path, capsys, damage, message):
    folder = data_set(tmp_path / "a")
    damage(folder)
    code, _, err = report(capsys, folder)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_index_and_search(tmp_path, capsys):
    """The whole way of a user: index, upgrade halfway, search, finish."""
    pytest.importorskip("pymilvus")
    old, new = models()
    files = [write_npz(tmp_path / f"{n}.npz", x) for n, x in (("old", old), ("new", new))]
    where = ["--uri", str(tmp_path / "x.db")]

    def index(file, version, told=None):
        words = ["retrieval", "index", "--features", str(file), "--version", version, *where]
        code, (out, err) = main(words), capsys.readouterr()
        assert ("warning" in err) == (told is not None)
        if told is not None:
            told.append(err)
        return code, out

    assert index(files[0], "v1") == (
        0,
        "items: 60 added, 0 replaced, 0 there already; 60 items, 60 of version v1\n",
    )
    half = new._replace(ids=new.ids[:20], vectors=new.vectors[:20])
    assert "20 replaced" in index(write_npz(tmp_path / "half.npz", half), "v2")[1]
    words = ["retrieval", "search", "--features", str(files[1]), "--k", "3", *where]
    assert main([*words, "--out", str(tmp_path / "hits.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == new.ids
    firsts = [row["hits"][0] for row in rows]
    assert np.mean([row["id"] == hit["id"] for row, hit in zip(rows, firsts, strict=True)]) > 0.9
    assert {hit["version"] for hit in firsts} == {"v1", "v2"}
    assert "40 replaced, 20 there already" in index(files[1], "v2")[1]
    one = old._replace(ids=old.ids[:1], vectors=old.vectors[:1])
    assert index(write_npz(tmp_path / "one.npz", one), "v1", told := [])[0] == 0
    assert "warning: items: replaces vectors of version v2 by those of v1" in told[0]
    assert "1 replaced" in index(files[1], "v2")[1]
    assert main([*words, "--versions", "v1"]) == 0
    assert all(not json.loads(line)["hits"] for line in capsys.readouterr().out.splitlines())
    assert index(files[0], "no/name")[0] == 2
    none = [*words[:-2], "--uri", str(tmp_path / "none.db")]
    assert main(none) == 2
    assert "none.db: no such database" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--pause", "nan"], "--pause nan"),
        (["--index", "TREE"], "--index TREE: unknown"),
    ],
)
def test_words_are_refused_before_a_database_is_made(tmp_path, capsys, words, message):
    file = write_npz(tmp_path / "f.npz", models()[0])
    uri = tmp_path / "x.db"
    given = ["retrieval", "index", "--features", str(file), "--version", "v1", "--uri", str(uri)]
    assert main([*given, *words]) == 2
    assert message in capsys.readouterr().err
    assert not uri.exists()
