# SPDX-License-Identifier: Apache-2.0
"""``m2jax reid eval`` on a tiny Market-1501 with a model that sees colours."""

import json

import numpy as np
import pytest
from PIL import Image

from m2jax import bundle
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.eval.sets.records import Made
from m2jax.models.class_tokens import ClassTokens
from m2jax.tasks import embedder
from m2jax.tasks.reid import evaluate as evaluate_lib
from m2jax.tasks.reid import train
from m2jax.tasks.reid.evaluate import evaluate
from m2jax.tasks.reid.metrics import Labels
from m2jax.tasks.reid.readers import ReidSet, Split


class Colours:
    """Features are the mean colour."""

    def preprocess(self, images):
        return np.stack([np.asarray(im.convert("RGB").resize((4, 4)), np.float32) for im in images])

    def encode_image(self, pixels):
        return pixels.mean((1, 2)) + 1e-3


@pytest.fixture
def market(tmp_path):
    """Three identities, each a colour, by two cameras; and a distractor near the first."""
    colours = {1: "red", 2: "lime", 3: "blue"}

    def save(folder, name, colour):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (6, 12), colour).save(tmp_path / folder / name)

    for identity, colour in colours.items():
        save("query", f"{identity:04d}_c1s1_000001_00.png", colour)
        save("bounding_box_test", f"{identity:04d}_c1s1_000002_00.png", colour)  # left out
        save("bounding_box_test", f"{identity:04d}_c2s1_000001_00.png", colour)
    save("bounding_box_test", "0000_c3s1_000001_00.png", "#ff0000")
    save("bounding_box_train", "0009_c1s1_000001_00.png", "white")
    return tmp_path


def test_eval(market, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "load", lambda path: Colours())
    words = ["reid", "eval", "--model", "x", "--data", str(market), "--layout", "market1501"]
    assert main([*words, "--batch-size", "2", "--json", str(market / "r.json")]) == 0
    found = json.loads((market / "r.json").read_text())["plain"]
    # A tie with the distractor counts against the first query.
    assert found["map"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["r1"] == pytest.approx(2 / 3)
    assert found["r5"] == 1
    assert "plain: mAP 0.8333" in capsys.readouterr().out
    assert main([*words, "--rerank"]) == 0
    assert "reranked: mAP" in capsys.readouterr().out


class Table:
    """Features by the red of a picture, of lengths that say nothing."""

    def __init__(self, lengths):
        features = np.random.default_rng(0).normal(size=(12, 5))
        self.features = features * lengths[:, None]

    def preprocess(self, images):
        return np.array([image.getpixel((0, 0))[0] for image in images])

    def encode_image(self, pixels):
        return self.features[pixels]


def test_lengths_of_features_mean_nothing():
    """Neither to the plain ranking nor to the re-ranked one, which is by Euclidean distances."""
    drawn = Made(12, lambda row: Image.new("RGB", (2, 2), (row, 0, 0)))
    side = Split(drawn, Labels(np.arange(12) // 4, np.arange(12) % 4))
    data = ReidSet(side, side, side)
    lengths = np.random.default_rng(1).uniform(0.1, 10, 12)
    found = [evaluate(Table(each), data, rerank=True, batch=5) for each in (np.ones(12), lengths)]
    assert found[0] == found[1]
    assert found[0]["plain"] != found[0]["reranked"]


def test_bad_words(market, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "load", lambda path: Colours())
    words = ["reid", "eval", "--model", "x", "--data", str(market)]
    assert main([*words, "--layout", "duke"]) == 2
    assert "use one of market1501, cuhk03, msmt17" in capsys.readouterr().err
    assert main([*words, "--layout", "msmt17"]) == 2
    (market / "query" / "0001_c1s1_000001_00.png").write_bytes(b"no picture")
    assert main([*words, "--layout", "market1501"]) == 2
    assert "0001_c1s1_000001_00.png" in capsys.readouterr().err


def test_a_set_of_one_camera_is_refused_before_it_is_embedded():
    drawn = Made(4, lambda row: pytest.fail("a picture was read"))
    side = Split(drawn, Labels(np.arange(4) // 2, np.zeros(4, int)))
    with pytest.raises(UserError, match="no query has a match by another camera"):
        evaluate(Table(np.ones(12)), ReidSet(side, side, side))


def test_more_cameras_than_the_model_knows(monkeypatch):
    """Refused before a picture is read, and measured without them if asked to."""

    class Sided(embedder.Embedder):
        """Features by the red of a picture; heard of cameras."""

        def preprocess(self, images):
            return np.array([image.getpixel((0, 0))[0] for image in images])

        def encode_image(self, pixels, cameras=None):
            told.append(cameras)
            return np.eye(12)[pixels]

    told, read = [], []

    def drawn(row):
        read.append(row)
        return Image.new("RGB", (2, 2), (row, 0, 0))

    tower = ClassTokens(cameras=3)
    pixels = embedder.Pixels(height=tower.height, width=tower.image_width)
    model = Sided(tower=tower, pixels=pixels, params={})
    side = Split(Made(12, drawn), Labels(np.arange(12) // 4, np.arange(12) % 4))
    with pytest.raises(UserError, match="has 4 cameras, the model knows 3: add --no-cameras"):
        evaluate(model, ReidSet(side, side, side))
    assert not read
    assert evaluate(model, ReidSet(side, side, side), cameras=False)["plain"]["queries"] == 12
    few = Split(side.images, Labels(np.arange(12) // 3, np.arange(12) % 3))
    assert told == [None]
    evaluate(model, ReidSet(few, few, few))
    np.testing.assert_array_equal(told[1], few.labels.cameras)


def test_no_cameras_reaches_the_measuring(market, monkeypatch):
    seen = []

    def called(model, data, **words):
        seen.append(words["cameras"])
        raise CalledError

    monkeypatch.setattr(bundle, "load", lambda path: Colours())
    monkeypatch.setattr(evaluate_lib, "evaluate", called)
    words = ["reid", "eval", "--model", "x", "--data", str(market), "--layout", "market1501"]
    assert main(words) == 1
    assert main([*words, "--no-cameras"]) == 1
    assert seen == [True, False]


class CalledError(Exception):
    """Ends a command where its training would begin."""


def test_each_word_reaches_the_training(market, monkeypatch):
    seen = []

    def called(data, settings, recipe, out, start):
        seen.append((settings, recipe))
        raise CalledError

    monkeypatch.setattr(train, "train", called)
    words = ["reid", "train", "--data", str(market), "--layout", "market1501", "--out", "run"]
    words += ["--size", "32x16", "--width", "24", "--layers", "2", "--heads", "4", "--patch", "8"]
    words += ["--tokens", "3", "--stride", "4", "--batches", "nearest", "--prototypes", "features"]
    words += ["--p", "5", "--k", "3", "--epochs", "7", "--optimizer", "sgd", "--seed", "9"]
    words += ["--diversity", "0.5", "--dynamic", "--scenes", "confusion", "--scene-weight", "0.3"]
    assert main([*words, "--learning-rate", "0.02"]) == 1
    assert main([*words[:-4], "--cameras"]) == 1
    settings, recipe = seen[0]
    assert (recipe.batches, recipe.p, recipe.k, recipe.epochs) == ("nearest", 5, 3, 7)
    assert (recipe.optimizer, recipe.learning_rate, recipe.seed) == ("sgd", 0.02, 9)
    assert (settings.diversity, settings.dynamic, settings.prototypes) == (0.5, True, "features")
    assert (settings.scenes, settings.scene_weight) == ("confusion", 0.3)
    tower = settings.tower
    assert (tower.height, tower.image_width, tower.width, tower.layers) == (32, 16, 24, 2)
    assert (tower.heads, tower.patch_size, tower.stride, tower.tokens) == (4, 8, (4, 4), 3)
    assert (tower.cameras, settings.pad) == (0, 1)
    assert seen[1][0].tower.cameras == 3  # of the gallery's too
    assert seen[1][1].learning_rate == 0.008
