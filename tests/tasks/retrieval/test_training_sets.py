# SPDX-License-Identifier: Apache-2.0
"""Which images and which old vectors compatible training is given."""

import numpy as np
import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.eval.sets.records import Files, Made
from m2jax.tasks.retrieval import training_sets
from m2jax.tasks.retrieval.train_compatible import Labelled
from tests.tasks.retrieval.test_train_compatible import labelled


def test_vectors_by_the_paths_of_images(tmp_path):
    names = [tmp_path / f"{n}.png" for n in range(4)]
    data = Labelled(Files(names), np.array([0, 0, 1, 2]), ["a", "b", "c"])
    np.savez(
        tmp_path / "f.npz",
        features=np.eye(4, dtype=np.float32)[:3],
        ids=[str(names[2]), str(names[3]), "elsewhere.png"],
    )
    found, there = training_sets.stored_in([tmp_path / "f.npz"], data, None)
    assert found.names == ["b", "c", "a"]
    assert found.labels.tolist() == [2, 2, 0, 1]
    assert there.known == 2
    wanted = [np.zeros(4), np.zeros(4), np.eye(4)[0], np.eye(4)[1]]
    np.testing.assert_array_equal(there.vectors, wanted)
    halves = [tmp_path / f"{name}.npz" for name in "pq"]
    np.savez(halves[0], features=np.eye(4)[:1], ids=[str(names[2])])
    np.savez(halves[1], features=np.eye(4)[1:3], ids=[str(names[3]), "elsewhere.png"])
    again, both = training_sets.stored_in(halves, data, None)
    assert again.names == found.names
    np.testing.assert_array_equal(both.vectors, wanted)
    np.savez(tmp_path / "g.npz", features=np.eye(2, dtype=np.float32), ids=["x", "y"])
    with pytest.raises(UserError, match="no id is the path"):
        training_sets.stored_in([tmp_path / "g.npz"], data, None)
    drawn = data._replace(images=Made(4, lambda row: Image.new("RGB", (2, 2))))
    with pytest.raises(UserError, match="lies in no files"):
        training_sets.stored_in([tmp_path / "f.npz"], drawn, None)


def test_a_share_of_the_classes_is_always_the_same():
    found = training_sets.some_classes(labelled(), 0.5)
    again = training_sets.some_classes(labelled(), 0.8)
    assert set(found.names) <= set(again.names) < set(labelled().names)
    kept = [n for n, name in enumerate(labelled().names) if name in found.names]
    rows = np.flatnonzero(np.isin(labelled().labels, kept))
    names = np.array(labelled().names)[labelled().labels[rows]]
    np.testing.assert_array_equal(np.array(found.names)[found.labels], names)
    for at in (0, len(rows) - 1):
        same = [np.asarray(s.images.read(r)) for s, r in ((found, at), (labelled(), rows[at]))]
        np.testing.assert_array_equal(*same)
    with pytest.raises(UserError, match="leaves 0 classes"):
        training_sets.some_classes(labelled(), 0.0)
