# SPDX-License-Identifier: Apache-2.0
"""Each test names a defect that an oracle on distinct, square data would let pass."""

import numpy as np
import pytest

from m2jax.data.emoji import Concept, Drawings
from m2jax.eval import baselines, figures, metrics, report_rankings, runner
from m2jax.eval import emoji as suite


def named(i):
    return Concept(
        id=i,
        hexcode=f"{i}",
        names={"en": f"<en{i}>", "zh": f"<zh{i}>"},
        keywords={},
        group=0,
        subgroup=0,
        base=f"{i}",
        seen=True,
    )


class Data:
    concepts = tuple(named(i) for i in range(3))
    attribution = ""


def scored(scores, right, seen=None):
    n, items = np.shape(scores)
    drawings = Drawings(
        np.full((n, 64, 64, 4), 255, np.uint8), np.arange(n, dtype=np.int32) % items, ("s",) * n
    )
    seen = np.ones(n, bool) if seen is None else seen
    return suite.Scored(
        "s", "en", drawings, np.arange(items), np.array(scores, float), np.array(right, bool), seen
    )


def test_each_direction_and_each_k_of_retrieval_is_counted_on_its_own():
    # every picture prefers text 0; each text ranks its own picture first
    scores = [[9.0, 1, 0], [5, 3, 0], [5, 0, 2]]
    found = figures.flat(suite.summarise(scored(scores, np.eye(3))))
    np.testing.assert_allclose(found["retrieval/s/seen/en/i2t_r1"], 1 / 3)
    assert found["retrieval/s/seen/en/i2t_r5"] == 1
    assert found["retrieval/s/seen/en/t2i_r1"] == 1
    np.testing.assert_allclose(found["retrieval/s/seen/en/mean_recall"], (1 / 3 + 5) / 6)


def test_every_concept_of_a_group_of_identical_drawings_counts():
    right = metrics.answer_matrix([frozenset({7, 2}), frozenset({9})], np.array([2, 7, 9]))
    np.testing.assert_array_equal(right, [[1, 1, 0], [0, 0, 1]])


def test_each_language_is_scored_by_its_own_names():
    asked = []

    class Model:
        def preprocess(self, images):
            return np.zeros((len(images), 1, 1, 3), np.float32)

        def tokenize(self, texts):
            asked.append(list(texts))
            return np.zeros((len(texts), 1), int), np.ones((len(texts), 1), bool)

        def encode_image(self, pixels):
            return np.ones((len(pixels), 1))

        def encode_text(self, ids, mask):
            return np.ones((len(ids), 1))

    class Answers(Data):
        def answers(self, drawings):
            return [frozenset({int(i)}) for i in drawings.concept]

        def is_seen(self, drawings):
            return np.ones(len(drawings.concept), bool)

    drawings = scored(np.eye(3), np.eye(3)).drawings
    suite.score_style(
        Model(), Answers(), drawings, np.arange(3), name="s", languages=("en", "zh"), batch=2
    )
    assert asked == [["<en0>", "<en1>", "<en2>"], ["<zh0>", "<zh1>", "<zh2>"]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearest_of_several_drawings_of_a_concept_decides(order):
    def plain(*greys):
        images = np.full((len(greys), 64, 64, 4), 255, np.uint8)
        images[..., :3] = np.array(greys)[:, None, None, None]
        return images

    concept = np.zeros(2, np.int32)
    near_and_far = plain(*np.array([100, 250])[list(order)])
    gallery = Drawings(
        np.concatenate([near_and_far, plain(140)]),
        np.append(concept, 1).astype(np.int32),
        ("s",) * 3,
    )
    query = Drawings(plain(105), concept[:1], ("s",))
    ranks = baselines.pixel_nn(query, gallery, np.arange(2), np.array([[True, False]]))
    assert ranks.tolist() == [0]


def test_the_validation_neighbours_leave_out_the_held_out_styles(monkeypatch):
    asked = []

    class Split(Data):
        def drawings(self, split, hold_out_styles=()):
            asked.append((split, hold_out_styles))
            return split

    monkeypatch.setattr(runner.emoji_data, "load", lambda directory: Split())
    monkeypatch.setattr(runner.emoji_suite, "score_style", lambda *a, **k: [])
    monkeypatch.setattr(runner, "_baseline", lambda data, style, queries, gallery: {gallery: 1.0})
    found = runner.run_suite(object(), suite="emoji-validation", hold_out_styles=("noto",)).metrics
    assert asked == [("validation", ("noto",)), ("train", ("noto",))]
    assert found == {"train": 1.0}


def test_examples_and_mistakes_are_escaped_and_name_the_concept_that_was_taken():
    row = scored([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]], np.eye(3))
    examples, mistakes = (
        report_rankings.examples(row, Data()),
        report_rankings.mistakes(row, Data()),
    )
    for page in (examples, mistakes):
        assert "<en" not in page
    assert "<li class=right>&lt;en1&gt;" in examples
    assert "&lt;en0&gt;<br>taken for <b>&lt;en2&gt;</b>" in mistakes


def test_neighbours_are_pairs_that_like_each_others_names_and_never_one_answer():
    scores = np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.0, 0.0, 1.0]])
    first = report_rankings.neighbours(scored(scores, np.eye(3)), Data()).split("<div class=card>")
    assert "&lt;en0&gt;<br>&lt;en1&gt;" in first[1]
    alike = np.eye(3)
    alike[0, 1] = alike[1, 0] = 1  # one drawing, two names: no confusion
    rest = report_rankings.neighbours(scored(scores, alike), Data())
    assert "&lt;en0&gt;<br>&lt;en1&gt;" not in rest


def test_searches_frame_the_right_drawings_alone_and_groups_count_them():
    row = scored([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]], np.eye(3))
    page = report_rankings.searches(row, Data())
    assert page.count("class=right") == 3  # every name's own drawing is among five of three
    shares = report_rankings.groups([row], Data())
    assert "67 <small>of 3</small>" in shares
