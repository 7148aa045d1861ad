# SPDX-License-Identifier: Apache-2.0
"""The scenes suite on models that know everything, nothing, or one thing wrong."""

import dataclasses
import types

import numpy as np
import pytest

from m2jax.data.emoji import Drawings
from m2jax.data.emoji import scenes as scenes_lib
from m2jax.data.emoji.scenes import Item, Scene
from m2jax.eval import report, runner
from m2jax.eval import scenes as suite
from tests.data.test_scenes import COLOURS, NAMES, emoji

GRID = 8


def data():
    made, drawings = emoji()
    made._splits["fluent"] = made._splits["openmoji"] = drawings.where(np.arange(4))
    concepts = tuple(dataclasses.replace(c, seen=True) for c in made.concepts)
    return dataclasses.replace(made, concepts=concepts)


class Oracle:
    """Knows every scene by its pixels, every text by itself, and every colour by its patch."""

    patch_grid = GRID
    languages = ("en", "zh")

    def __init__(self, shown):
        self.captions = {"en": {}, "zh": {}}
        self.number = {}
        for scene, image in zip(shown.scenes, shown.images, strict=True):
            for language, known in self.captions.items():
                known[image.tobytes()] = scene.captions[language]
            # One number per caption, the same in both languages.
            self.number.setdefault(scene.captions["en"], len(self.number))
            self.number[scene.captions["zh"]] = self.number[scene.captions["en"]]
        self.pixels = {}

    def preprocess(self, images):
        pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
        for row, image in zip(pixels, images, strict=True):
            self.pixels[row.tobytes()] = image.tobytes()
        return pixels

    def tokenize(self, texts):
        names = [*NAMES, *(f"物{i}" for i in range(4))]
        ids = [[self.number.get(text, -1), names.index(text) % 4 if text in names else -1]
               for text in texts]  # fmt: skip
        return np.array(ids), np.ones((len(texts), 2), bool)

    def encode_image(self, pixels):
        known = [self.number[self.captions["en"][self.pixels[row.tobytes()]]] for row in pixels]
        return np.eye(200)[known]

    def encode_text(self, ids, mask):
        name, caption = ids[:, 1] >= 0, ids[:, 0] >= 0
        assert (name != caption).all()
        return np.where(name[:, None], np.eye(200)[ids[:, 1]], np.eye(200)[ids[:, 0]])

    def encode_patches(self, pixels):
        step = scenes_lib.GRID // GRID
        middle = pixels[:, step // 2 :: step, step // 2 :: step]
        near = np.abs(middle[..., None, :3] - np.array(COLOURS) / 255).sum(-1)
        drawn = middle[..., 3:] > 0
        return (np.eye(200)[near.argmin(-1)] * drawn).reshape(len(pixels), GRID * GRID, -1)

    def __call__(self, images, *, language):
        return [self.captions[language][image.tobytes()] for image in images]


def scored(kind=Oracle, *, count=40, batch=16):
    shown = suite.pictures(data(), data().drawings("fluent"), count)
    model = kind(shown)
    return shown, suite.score_style(
        model, shown, name="s", languages=("en", "zh"), batch=batch, writer=model
    )


def test_one_who_knows_everything_gets_everything():
    shown, found = scored()
    for language in ("en", "zh"):
        stem = f"scenes/s/{language}"
        for way in ("i2t", "t2i"):
            assert [found[f"{stem}/{way}_r{k}"] for k in (1, 5, 10)] == [1, 1, 1]
        assert found[f"{stem}/mean_recall"] == found[f"{stem}/pointing"] == 1
        assert found[f"{stem}/rouge_l"] == 1
        np.testing.assert_allclose(found[f"{stem}/bleu4"], 1, rtol=1e-9)
        for name in ("mean_recall", "pointing", "cider", "bleu4", "rouge_l", "i2t_r5"):
            assert found[f"{stem}/{name}_low"] <= found[f"{stem}/{name}"]
            assert found[f"{stem}/{name}"] <= found[f"{stem}/{name}_high"]
        blind = f"baseline/another_caption/{stem}"  # sounds right, and tells of something else
        assert 0 < found[f"{blind}/cider"] < 0.2 * found[f"{stem}/cider"]
        assert 0.2 < found[f"{blind}/rouge_l"] < 0.9
    expected = np.mean([1 / 40, 5 / 40, 10 / 40])
    np.testing.assert_allclose(found["baseline/chance/scenes/s/mean_recall"], expected)
    assert len({scene.captions["en"] for scene in shown.scenes}) < 40  # equal captions were right
    assert "s/zh" in runner.table(found)
    assert "another picture's caption: s/zh/cider" in runner.table(found)
    assert found.keys() == scored(batch=7)[1].keys()
    assert found == scored(batch=7)[1]  # batches that do not divide lose no row


def test_chance_of_pointing_is_the_share_of_the_picture():
    """A model of random patches points at drawings as often as they are large."""

    class Blind(Oracle):
        def encode_patches(self, pixels):
            return np.random.default_rng(0).normal(size=(len(pixels), GRID * GRID, 200))

    shown, found = scored(Blind, count=150)
    area = []
    for scene in shown.scenes:
        for name in dict.fromkeys(scene.names["en"]):
            boxes = [
                i.box for i, n in zip(scene.items, scene.names["en"], strict=True) if n == name
            ]
            area.append(sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes) / scenes_lib.GRID**2)
    chance = found["baseline/chance/scenes/s/pointing"]
    np.testing.assert_allclose(chance, np.mean(area), rtol=0.08)  # middles of patches, not area
    low, high = (found[f"scenes/s/en/pointing_{end}"] for end in ("low", "high"))
    assert low < chance < high


def test_who_tells_drawings_from_the_ground_alone_is_right_by_their_share():
    class Ground(Oracle):
        def encode_patches(self, pixels):
            drawn = super().encode_patches(pixels).any(-1, keepdims=True)
            noise = np.random.default_rng(0).random((*drawn.shape[:2], 200))
            return np.where(drawn, 1 + noise, 0)

    _, found = scored(Ground, count=150)
    expected = found["baseline/any_drawing/scenes/s/pointing"]
    assert expected > 1.5 * found["baseline/chance/scenes/s/pointing"]
    low, high = (found[f"scenes/s/en/pointing_{end}"] for end in ("low", "high"))
    assert low < expected < high


def test_a_model_that_takes_columns_for_rows_points_worse():
    class Transposed(Oracle):
        def encode_patches(self, pixels):
            patches = super().encode_patches(pixels).reshape(len(pixels), GRID, GRID, -1)
            return patches.swapaxes(1, 2).reshape(len(pixels), GRID * GRID, -1)

    class Flat(Oracle):
        def encode_patches(self, pixels):
            return np.ones((len(pixels), GRID * GRID, 200))

    assert scored(Transposed)[1]["scenes/s/en/pointing"] < 0.8
    assert scored(Flat)[1]["scenes/s/en/pointing"] == 0  # a constant score earns nothing


def test_ways_and_languages_are_told_apart():
    class Lopsided(Oracle):
        def encode_image(self, pixels):  # every picture likes the first caption best
            return super().encode_image(pixels) + 2 * np.eye(200)[0]

        def tokenize(self, texts):  # and Chinese captions are taken for others
            ids, mask = super().tokenize(texts)
            chinese = np.array(["\u4e00" <= text[-1] <= "\u9fff" for text in texts])
            return np.where((chinese & (ids[:, 0] >= 0))[:, None], np.add(ids, [1, 0]), ids), mask

    shown, found = scored(Lopsided)
    first = np.mean([s.captions["en"] == shown.scenes[0].captions["en"] for s in shown.scenes])
    assert found["scenes/s/en/i2t_r1"] == first
    assert found["scenes/s/en/t2i_r1"] == 1
    assert found["scenes/s/zh/t2i_r1"] < 1


def test_targets_are_the_patches_whose_middle_a_drawing_covers():
    said = {"en": ("a", "b")}
    one = Scene("left", (Item(4, (0, 0, 32, 17)), Item(5, (48, 40, 64, 64))), said, {}, {})
    two = Scene("count", (Item(4, (0, 0, 8, 8)), Item(4, (57, 57, 64, 64))), said, {}, {})
    found = suite.targets([one, two], 4)  # middles at 8, 24, 40, 56
    assert found.scene.tolist() == [0, 0]  # the small ones hold no middle
    assert found.item == [0, 1]
    assert np.flatnonzero(found.on[0]).tolist() == [0, 1]
    assert np.flatnonzero(found.on[1]).tolist() == [11, 15]
    for row in found.drawn:
        assert np.flatnonzero(row).tolist() == [0, 1, 11, 15]
    found = suite.targets([two], 8)
    assert np.flatnonzero(found.on[0]).tolist() == [0, 63]  # all drawings of a name count


def test_statements_tell_the_same_of_a_scene_from_both_sides():
    made, drawings = emoji()
    for seed in range(40):
        scene = scenes_lib.compose(made, drawings, np.random.default_rng(seed))
        english = scene.statements["en"]
        assert english[0] == scene.captions["en"]
        assert [NAMES[drawings.concept[i.drawing]] for i in scene.items] == [*scene.names["en"]]
        if scene.kind == "left":
            a, b = scene.names["en"]
            assert english[1] == f"{b} to the right of {a}"
            assert (
                scene.statements["zh"][1] == f"{scene.names['zh'][1]}在{scene.names['zh'][0]}的右边"
            )
        if scene.kind == "above":
            assert english[1] == f"{scene.names['en'][1]} below {scene.names['en'][0]}"
        assert len(english) == (1 if scene.kind in ("count", "larger") else 2)


@pytest.mark.parametrize("colours", [(9, 50, 80, 80), (9, 50, 80, 99)], ids=["alike", "unseen"])
def test_drawings_that_look_alike_and_unseen_concepts_are_not_asked_for(colours):
    images = np.stack([np.full((64, 64, 4), colour, np.uint8) for colour in colours])
    drawings = Drawings(images, np.arange(4, dtype=np.int32), ("fluent",) * 4)
    made = data()
    unseen = [dataclasses.replace(c, seen=colours[3] == 80 or c.id < 2) for c in made.concepts]
    made = dataclasses.replace(made, concepts=tuple(unseen))
    shown = suite.pictures(made, drawings, 30)
    assert {name for scene in shown.scenes for name in scene.names["en"]} == {"sun", "cat"}


def test_a_suite_of_few_concepts_asks_for_those_of_its_training(monkeypatch):
    asked = set()

    def score(model, shown, **kwargs):
        asked.update(name for scene in shown.scenes for name in scene.names["en"])
        return {}

    monkeypatch.setattr(runner.emoji_data, "load", lambda directory: data())
    monkeypatch.setattr(runner.scenes_suite, "score_style", score)
    runner.emoji_scenes(None, runner.Setting("", ("en",), 8, (), None), concepts=2)
    chosen = scenes_lib.of_concepts(data(), data().drawings("fluent"), 2)
    assert asked == {data().concepts[i].names["en"] for i in chosen.concept}


def test_the_suite_takes_a_model_without_patches_and_without_captions(monkeypatch, tmp_path):
    monkeypatch.setattr(runner.emoji_data, "load", lambda directory: data())
    monkeypatch.setattr(report, "load_emoji", lambda directory: data())
    monkeypatch.setattr(suite.pictures, "__defaults__", (20,))
    oracle = Oracle(suite.pictures(data(), data().drawings("fluent")))
    methods = ("preprocess", "tokenize", "encode_image", "encode_text")
    plain = types.SimpleNamespace(**{name: getattr(oracle, name) for name in methods})
    found = runner.run_suite(plain, suite="emoji-scenes", languages=("en",))
    assert found.metrics["scenes/openmoji/en/t2i_r1"] == 1
    assert not [k for k in found.metrics if "pointing" in k or "cider" in k or "/zh/" in k]
    (tmp_path / "config.json").write_text("{}")
    report.write_report(tmp_path, found.metrics, found.scored)
    assert "scenes/openmoji/en/t2i_r1" in (tmp_path / "report.html").read_text()
