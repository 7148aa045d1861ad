# SPDX-License-Identifier: Apache-2.0
"""Features scored by the ground truths that data sets publish: tiny trees in their layouts."""

import json
import pickle

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.tasks.retrieval.backfill import Features
from m2jax.tasks.retrieval.upgrade import judge
from tests.tasks.retrieval.databases import write_npz

# What a query at 0 degrees finds, in order; b is of neither queries nor gallery.
DEGREES = {"q_1": 0.0, "b_9": 0.2, "w_1": 0.5, "e_1": 1.0, "w_2": 1.5, "j_1": 2.0, "h_1": 3.0}


def features(file, degrees, path):
    turned = np.deg2rad([*degrees.values()])
    vectors = np.stack([np.cos(turned), np.sin(turned)], 1).astype(np.float32)
    return write_npz(file, Features([path(name) for name in degrees], vectors))


def oxford(folder, degrees):
    """``gnd_roxford5k.pkl`` and features of all of ``jpg/``, in another order than its list's."""
    folder.mkdir(exist_ok=True)
    row = {"bbx": [0.0, 0, 9, 9], "easy": [4], "hard": [1], "junk": [0]}
    images = ["j_1", "h_1", "w_2", "w_1", "e_1"]
    made = {"imlist": images, "qimlist": ["q_1"], "gnd": [row]}
    truth = folder / "gnd_roxford5k.pkl"
    truth.write_bytes(pickle.dumps(made))
    path = str(folder / "jpg" / "{}.jpg").format
    return truth, features(folder / "all.npz", degrees, path)


def measured(capsys, queries, gallery, truth, *more):
    words = ["--queries", queries, "--gallery", gallery, "--truth", truth, *more]
    code = main(["retrieval", "eval", *map(str, words)])
    return code, *capsys.readouterr()


def test_revisited_oxford(tmp_path, capsys):
    """Query, list and what is in neither come from one file of features."""
    truth, file = oxford(tmp_path / "roxford5k", DEGREES)
    out = tmp_path / "found.json"
    code, told, err = measured(capsys, file, file, truth, "--json", out)
    assert code == 0, err
    figures = "easy mAP 0.2500, medium mAP 0.3333, hard mAP 0.1667"  # by hand
    assert told == f"{figures} over 1 queries and 5 items\n"
    found = json.loads(out.read_text())
    assert found == pytest.approx({"easy mAP": 1 / 4, "medium mAP": 1 / 3, "hard mAP": 1 / 6})


def test_an_upgrade_on_revisited_paris(tmp_path, capsys):
    """The data set's own folder, with features in it, stands for one with truth.json."""
    better = DEGREES | {"w_1": 50.0, "w_2": 60.0}
    for model, degrees in (("old", DEGREES), ("new", better)):
        _, file = oxford(tmp_path / "rparis6k", degrees)
        for side in ("queries", "gallery"):
            (file.parent / f"{model}_{side}.npz").write_bytes(file.read_bytes())
    folder = tmp_path / "rparis6k"
    (folder / "gnd_roxford5k.pkl").rename(folder / "gnd_rparis6k.pkl")
    (found,) = judge([folder]).sets
    assert (found.old, found.new) == pytest.approx((1 / 3, 1))
    assert found.metric == "medium mAP"
    (folder / "truth.json").write_text("{}")
    assert main(["retrieval", "upgrade-report", str(folder)]) == 2
    assert "leave one truth there" in capsys.readouterr().err


IDS = [f"{i:016x}" for i in range(9)]


def landmarks(folder):
    """Queries 0 to 2, index images 3 to 6; right for 0 are the nearest and the third."""
    folder.mkdir()
    truth = folder / "retrieval_solution_v2.1.csv"
    truth.write_text(
        f"id,images,Usage\n{IDS[0]},{IDS[5]} {IDS[3]},Private\n{IDS[1]},{IDS[6]},Public\n"
        f"{IDS[2]},None,Ignored\n"
    )

    def path(part):
        return lambda name: str(folder / part / name[0] / name[1] / name[2] / f"{name}.jpg")

    asked = features(folder / "q.npz", dict(zip(IDS[:3], (0, 90, 80), strict=True)), path("test"))
    items = dict(zip(IDS[3:7], (1, 2, 3, 4), strict=True))
    return truth, asked, features(folder / "g.npz", items, path("index"))


def test_google_landmarks(tmp_path, capsys):
    truth, queries, gallery = landmarks(tmp_path / "gldv2")
    _, told, _ = measured(capsys, queries, gallery, truth)
    assert told == "mAP@100 0.8333 over 1 queries and 4 items\n"
    _, told, _ = measured(capsys, queries, gallery, truth, "--k", "2")
    assert told.startswith("mAP@2 0.5000")


def test_a_protocol_without_right_items_is_left_out(tmp_path, capsys):
    truth, file = tmp_path / "truth.json", features(tmp_path / "f.npz", DEGREES, str)
    truth.write_text(json.dumps({"easy": {}, "hard": {"q_1": ["q_1"]}, "junk": {}}))
    _, told, _ = measured(capsys, file, file, truth)
    assert told.startswith("medium mAP 1.0000, hard mAP 1.0000 over")


def test_what_cannot_be_scored(tmp_path, capsys):
    truth, queries, gallery = landmarks(tmp_path / "gldv2")

    def refused(message, *given):
        code, _, err = measured(capsys, *given)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1

    lacking = f"names {IDS[3]}, of which the gallery hold no features"
    few = features(tmp_path / "few.npz", {IDS[5]: 1.0}, str)
    refused(lacking, queries, few, truth)
    refused(f"names {IDS[0]}, of which the queries hold no", gallery, gallery, truth)
    twice = features(tmp_path / "t.npz", {f"a/{IDS[0]}.jpg": 1.0, f"b/{IDS[0]}.png": 2.0}, str)
    refused(f"are both its '{IDS[0]}'", twice, gallery, truth)
    refused("--k 0", queries, gallery, truth, "--k", "0")
    refused("unreadable", queries, gallery, tmp_path / "missing.json")
    long = write_npz(tmp_path / "long.npz", Features(IDS[:1], np.ones((1, 3), np.float32)))
    refused("the gallery's have 2", long, gallery, truth)
