# SPDX-License-Identifier: Apache-2.0
import os
import pickle

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.retrieval import landmarks


def ground_truth(folder, **changes):
    rows = [
        {"bbx": [1.0, 2, 30, 40], "easy": [0], "hard": [2], "junk": []},
        {"bbx": np.array([0.0, 0, 9, 9]), "easy": np.array([1]), "hard": [], "junk": [0, 2]},
    ]
    made = {"imlist": ["a_1", "b_2", "c_3"], "qimlist": ["q_1", "q_2"], "gnd": rows} | changes
    file = folder / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(made))
    return file


def test_revisited(tmp_path):
    found = landmarks.revisited(ground_truth(tmp_path))
    assert [file.name for file in found.gallery] == ["a_1.jpg", "b_2.jpg", "c_3.jpg"]
    assert found.queries[1] == tmp_path / "jpg" / "q_2.jpg"
    assert found.boxes[0] == (1, 2, 30, 40)
    assert [each.tolist() for each in found.truth.junk] == [[], [0, 2]]
    assert [each.tolist() for each in found.truth.easy] == [[0], [1]]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/m2jax-bomb",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imlist": [Bomb()]}, "system, which is no data"),
        ({"imlist": ["a_1"]}, "images that the list has not"),
        ({"qimlist": ["q"]}, "1 queries, 2 truths"),
        ({"imlist": ["../a", "b", "c"]}, "no name of an image"),
        ({"gnd": [{}, {}]}, "no ground truth"),
    ],
)
def test_ground_truths_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        landmarks.revisited(ground_truth(tmp_path, **changes))
    assert not os.path.exists("/tmp/m2jax-bomb")


def test_no_ground_truth(tmp_path):
    file = tmp_path / "gnd_rparis6k.pkl"
    for _ in range(2):
        with pytest.raises(UserError, match=r"gnd_rparis6k\.pkl: no ground truth"):
            landmarks.revisited(file)
        file.write_bytes(b"")


IDS = [f"{i:016x}" for i in range(4)]


def test_gldv2(tmp_path):
    train, solution = tmp_path / "train_clean.csv", tmp_path / "retrieval_solution_v2.1.csv"
    train.write_text(f"landmark_id,images\n7,{IDS[0]} {IDS[1]}\n9,{IDS[2]}\n")
    found = landmarks.gldv2_train(train, tmp_path)
    assert found.labels.tolist() == [0, 0, 1]
    assert found.landmarks == ["7", "9"]
    assert found.files[0] == tmp_path / "0" / "0" / "0" / f"{IDS[0]}.jpg"
    solution.write_text(
        f"id,images,Usage\n{IDS[0]},{IDS[1]} {IDS[2]},Private\n{IDS[3]},None,Ignored\n"
        f"{IDS[1]},{IDS[2]},Public\n"
    )
    found = landmarks.gldv2_solution(solution)
    assert found.queries == [IDS[0]]
    assert found.right == [[IDS[1], IDS[2]]]
    assert landmarks.gldv2_solution(solution, "Public").queries == [IDS[1]]
    with pytest.raises(UserError, match="no query of Usage Secret"):
        landmarks.gldv2_solution(solution, "Secret")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks one of the columns"),
        ("landmark_id,images\n", "has no row"),
        ("landmark_id,images\n7\n", "line 2 is cut off"),
        ("landmark_id,images\n7,../../etc\n", "line 2: '../../etc' is no id"),
    ],
)
def test_tables_that_cannot_be(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        landmarks.gldv2_train(tmp_path / "t.csv", tmp_path)
