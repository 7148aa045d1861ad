# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2jax.config import UserError
from m2jax.data.emoji import Concept, Drawings
from m2jax.eval import baselines, metrics, report, runner
from m2jax.eval import emoji as suite


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ranks_equal_a_brute_force_with_ties_against_the_query(scores, seed):
    table = np.array(scores, np.float64)
    right = np.random.default_rng(seed).random(table.shape) < 0.4
    found = metrics.first_right(table, right)
    for row in range(len(table)):
        # wrong items first among equals: the least favourable order
        order = sorted(range(4), key=lambda j: (-table[row, j], right[row, j]))
        places = [k for k, j in enumerate(order) if right[row, j]]
        assert found[row] == (places[0] if places else 4)


def test_a_constant_score_earns_nothing():
    right = np.eye(5, dtype=bool)
    assert metrics.hits(metrics.first_right(np.ones((5, 5)), right), 1).value == 0


def test_nan_is_refused():
    with pytest.raises(UserError, match="NaN"):
        metrics.first_right(np.array([[np.nan]]), np.array([[True]]))


def test_wilson_interval_against_published_values():
    share = metrics.wilson(15, 148)  # Newcombe 1998, table II: 0.0624 to 0.1605
    np.testing.assert_allclose(share[1:], [0.0624, 0.1605], atol=5e-5)
    assert metrics.wilson(0, 0) == (0, 0, 1)


def test_the_mean_recall_interval_covers_what_a_binomial_would():
    ranks = np.where(np.random.default_rng(1).random(400) < 0.3, 0, 50)
    share = metrics.mean_recall([ranks], [1])
    wilson = metrics.wilson(int((ranks < 1).sum()), 400)
    np.testing.assert_allclose(share, wilson, atol=0.006)
    both = metrics.mean_recall([ranks, np.zeros(400, int)], [1, 5])
    np.testing.assert_allclose(both.value, (share.value + 1) / 2)
    assert (both.high - both.low) < 0.6 * (share.high - share.low)  # half the spread in one way
    assert metrics.mean_recall([np.zeros(3, int)], [1]) == (1, 1, 1)
    # Directions are drawn each on its own, were they alike to the last query.
    twice = metrics.mean_recall([ranks, ranks], [1])
    spread = (twice.high - twice.low) / (share.high - share.low)
    assert spread == pytest.approx(0.5**0.5, abs=0.07)


def picture(colour):
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., :3] = colour
    image[..., 3] = 255
    return image


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 0)]


class FakeData:
    """Four colours; the last is unseen."""

    attribution = "drawn by <nobody>"
    concepts = tuple(
        Concept(
            id=i,
            hexcode=f"{i}",
            names={"en": f"<c{i}>", "zh": f"色{i}"},
            keywords={},
            group=0,
            subgroup=0,
            base=f"{i}",
            seen=i < 3,
        )
        for i in range(4)
    )

    def drawings(self, split, hold_out_styles=()):
        ids = np.arange(4, dtype=np.int32) if split != "train" else np.arange(3, dtype=np.int32)
        return Drawings(np.stack([picture(COLOURS[i]) for i in ids]), ids, ("s",) * len(ids))

    def training_styles(self):
        return self.drawings("train")

    def answers(self, drawings):
        return [frozenset({int(i)}) for i in drawings.concept]

    def is_seen(self, drawings):
        return drawings.concept < 3


class Oracle:
    """Knows every colour, and every name."""

    def preprocess(self, images):
        return np.stack([np.asarray(i.convert("RGB"), np.float32) / 255 for i in images])

    def tokenize(self, texts):
        ids = np.array([[int(t.strip("<c>色"))] for t in texts])
        return SimpleNamespace(ids=ids, mask=ids > -1, __iter__=None) and (ids, ids > -1)

    def encode_image(self, pixels):
        colours = np.array(COLOURS) / 255
        near = ((pixels[:, 0, 0, None] - colours) ** 2).sum(-1).argmin(1)
        return np.eye(4)[near]

    def encode_text(self, ids, mask):
        return np.eye(4)[ids[:, 0]]


@pytest.fixture
def fake(monkeypatch):
    data = FakeData()
    monkeypatch.setattr(runner.emoji_data, "load", lambda directory: data)
    monkeypatch.setattr(report, "load_emoji", lambda directory: data)
    return data


def test_an_oracle_gets_everything_and_keys_are_the_promised_ones(fake):
    found = runner.run_suite(Oracle()).metrics
    for style in ("fluent", "openmoji"):
        for part in ("seen", "unseen"):
            for lang in ("en", "zh"):
                assert found[f"zero_shot/{style}/{part}/{lang}/top1"] == 1
                assert found[f"zero_shot/{style}/{part}/{lang}/top5_high"] == 1
                assert found[f"retrieval/{style}/{part}/{lang}/i2t_r1"] == 1
                assert found[f"retrieval/{style}/{part}/{lang}/t2i_r10"] == 1
                assert found[f"retrieval/{style}/{part}/{lang}/mean_recall"] == 1
        assert found[f"baseline/pixel_nn/{style}/top1"] == 1
        assert found[f"baseline/chance/{style}/top1"] == 0.25
        # Three seen names: recall at 1 is 1/3, at 5 and 10 it is 1, in both directions.
        assert found[f"baseline/chance/{style}/seen/mean_recall"] == pytest.approx(7 / 9)
    assert all(0 <= v <= 1 for v in found.values())
    assert "pixel_nn/fluent" in runner.table(found)


def test_the_table_shows_every_interval_and_what_chance_would_give():
    found = {"zero_shot/a/unseen/en/top1": 0.5, "zero_shot/a/unseen/en/top5": 0.75}
    found |= {"zero_shot/a/unseen/en/top5_low": 0.7, "zero_shot/a/unseen/en/top5_high": 0.8}
    found |= {"retrieval/a/unseen/en/mean_recall": 0.25, "baseline/pixel_nn/a/top1": 0.125}
    found |= {"baseline/pixel_nn/a/top5": 0.2, "baseline/chance/a/unseen/mean_recall": 0.03}
    head, neighbour, model = runner.table(found).splitlines()
    assert head.split() == ["top-1", "top-5", "mean", "recall", "by", "chance"]
    assert neighbour.split() == ["pixel_nn/a", "12.5", "20.0"]
    assert model.split() == ["a/unseen/en", "50.0", "75.0", "(70.0", "-", "80.0)", "25.0", "3.0"]


def test_a_model_that_swaps_two_names_loses_exactly_those(fake):
    class Swapped(Oracle):
        def encode_text(self, ids, mask):
            return np.eye(4)[np.array([1, 0, 2, 3])[ids[:, 0]]]

    found = runner.run_suite(Swapped()).metrics
    np.testing.assert_allclose(found["zero_shot/fluent/seen/en/top1"], 1 / 3)
    assert found["zero_shot/fluent/unseen/en/top1"] == 1


def test_batches_that_do_not_divide_lose_no_row(fake):
    drawings = fake.drawings("fluent")
    for batch in (1, 3, 4, 9):
        np.testing.assert_array_equal(suite.image_features(Oracle(), drawings, batch), np.eye(4))


def test_the_pixel_neighbour_is_the_least_squared_distance(fake):
    noisy = fake.drawings("fluent").where(np.arange(3))
    noisy.images[..., 1] = np.maximum(noisy.images[..., 1], 60)
    right = np.eye(3, dtype=bool)
    ranks = baselines.pixel_nn(noisy, fake.drawings("train"), np.arange(3), right)
    assert ranks.tolist() == [0, 0, 0]
    assert baselines.thumbnails(noisy.images).shape == (3, 16 * 16 * 3)


def test_thumbnails_are_bilinear_on_white():
    image = np.zeros((1, 64, 64, 4), np.uint8)
    assert baselines.thumbnails(image).min() == 1
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 4), np.uint8)
    image[..., 3] = 255
    small = Image.fromarray(image[0, ..., :3]).resize((16, 16), Image.Resampling.BILINEAR)
    expected = np.asarray(small, np.float32).reshape(-1) / 255
    np.testing.assert_allclose(baselines.thumbnails(image)[0], expected)


def test_unknown_suites_and_languages_are_refused():
    with pytest.raises(UserError, match="emoji-validation"):
        runner.run_suite(Oracle(), suite="imagenette")
    with pytest.raises(UserError, match=r"with --data \[READER:\]PATH"):
        runner.run_suite(Oracle(), suite="imagenet")
    with pytest.raises(UserError, match="fr"):
        runner.run_suite(Oracle(), languages=("fr",))


def test_the_report_is_self_contained_and_escaped(fake, tmp_path):
    evaluation = runner.run_suite(Oracle())
    (tmp_path / "config.json").write_text('{"model": "<script>"}')
    rows = [{"step": i, "loss": 3.0 - i, "samples_per_s": 9.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    runner.write_metrics(tmp_path / "metrics.json", evaluation.metrics)
    report.write_report(tmp_path, evaluation.metrics, evaluation.scored)
    page = Path(tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;c0&gt;" in page
    assert "http" not in page
    assert "&lt;nobody&gt;" in page
    assert page.count("<img") >= 4
    assert "<polyline" in page
    assert not list(tmp_path.glob("*.tmp"))
