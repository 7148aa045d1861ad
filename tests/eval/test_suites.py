# SPDX-License-Identifier: Apache-2.0
"""Each protocol on a small data set whose answers are known, from files to figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.eval import features, figures, metrics, runner, suites, tables
from m2jax.eval.sets.records import Made, Place
from m2jax.eval.suites import Request
from tests.eval.pictures import CHINESE, COLOURS, ColourModel, picture, save


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """Four pictures per colour for training, two for the test."""
    for split, count in (("train", 4), ("test", 2)):
        for colour in COLOURS:
            for number in range(count):
                save(tmp_path / split / colour / f"{number}.png", colour)
    return tmp_path


NAMES = {"zh": {colour: (CHINESE[colour],) for colour in COLOURS}}


def request(path, **more):
    return Request("colours", Place(path, names=more.pop("names", None)), batch=4, **more)


def test_zero_shot_in_two_languages(folder):
    given = {**NAMES, "en": {colour: (colour,) for colour in COLOURS}}
    found = suites.score(ColourModel(), "zero-shot", request(folder, names=given)).figures
    for language in ("en", "zh"):
        assert found[f"zero_shot/colours/{language}/top1"].share.value == 1
        assert found[f"zero_shot/colours/{language}/mean_per_class"].share.value == 1
    assert found["baseline/chance/colours/top1"].share.value == pytest.approx(1 / 3)
    wrong = {"en": {"red": ("green",), "green": ("red",), "blue": ("blue",)}}
    found = suites.score(ColourModel(), "zero-shot", request(folder, names=wrong)).figures
    assert found["zero_shot/colours/en/top1"].share.value == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=r"--languages zh: .* has en"):
        suites.score(ColourModel(), "zero-shot", request(folder, languages=("zh",)))


def test_prompts_of_ones_own_are_used(folder):
    model = ColourModel()
    asked = request(folder, templates={"en": ["only {c}"]}, languages=("en",))
    suites.score(model, "zero-shot", asked)
    assert sorted(model.texts) == ["only blue", "only green", "only red"]


def test_several_labels_give_average_precision(tmp_path):
    rows = []
    for number, (colour, label) in enumerate([("red", [0]), ("green", [1]), ("blue", [0, 2])]):
        save(tmp_path / f"{number}.png", colour)
        rows.append({"image": f"{number}.png", "label": label})
    given = {"en": [("red",), ("green",), ("blue",)]}
    file = lines(tmp_path / "x.jsonl", rows)
    asked = request(file, names=given, templates={"en": ["{c}"]})
    found = suites.score(ColourModel(), "zero-shot", asked).figures
    # Cosines with red: the red picture 1, the green one 0.196, the blue one 0.187, so of the two
    # that are right one is first and one third: (1/1 + 2/3) / 2. The other classes have one, first.
    value = found["zero_shot/colours/en/map"].share.value
    assert value == pytest.approx((5 / 6 + 1 + 1) / 3, abs=1e-9)
    with pytest.raises(UserError, match="use --suite zero-shot for mAP"):
        suites.score(ColourModel(), "linear-probe", request(file, names=given, train_data=file))


def test_retrieval_in_every_protocol(tmp_path):
    rows = []
    for number, colour in enumerate(COLOURS):
        save(tmp_path / f"{number}.png", colour)
        captions = [f"a {colour} thing", f"{colour} as far as one can see"]
        rows.append({"image": f"{number}.png", "caption": captions})
    file = lines(tmp_path / "f.jsonl", rows)
    scored = suites.score(ColourModel(), "retrieval", request(file))
    found = scored.figures
    for protocol in ("standard", "m2_release", "one_caption"):
        assert found[f"retrieval/colours/en/{protocol}/i2t_r1"].share.value == 1
        assert found[f"retrieval/colours/en/{protocol}/mean_recall"].share.value == 1
    assert found["data/colours/en/captions_per_image"].share.value == 2
    assert "retrieval/colours/zh/standard/i2t_r1" not in found
    again = suites.score(ColourModel(), "retrieval", request(file))
    assert again.questions == scored.questions
    lines(file, [*rows[:2], {**rows[2], "caption": ["other"]}])
    assert suites.score(ColourModel(), "retrieval", request(file)).questions != scored.questions


class FakeRater:
    """Finds likeliest the colour that it sees, but takes green for red."""

    languages = ("en",)

    def log_likelihood(self, images, texts, *, language):
        [image] = images
        seen = list(COLOURS.values()).index(image.convert("RGB").getpixel((0, 0)))
        said = ("red", "red", "blue")[seen]
        return np.array([float(said in text) for text in texts])


def test_choosing_by_the_cosine_and_by_likelihood(tmp_path):
    rows = []
    for number, colour in enumerate(COLOURS):
        save(tmp_path / f"{number}.png", colour)
        texts = list(COLOURS)
        rows.append({"image": f"{number}.png", "texts": texts, "right": texts.index(colour)})
    file = lines(tmp_path / "q.jsonl", rows)
    found = suites.score(ColourModel(), "choice", request(file, rater=FakeRater())).figures
    assert found["choice/colours/en/accuracy"].share.value == 1
    likely = found["choice/colours/en/accuracy_by_likelihood"].share.value
    assert likely == pytest.approx(2 / 3)  # of any one picture read for all: 1 / 3
    assert found["baseline/chance/colours/en/accuracy"].share.value == pytest.approx(1 / 3)


def test_the_linear_probe_learns_what_features_tell(folder):
    found = suites.score(ColourModel(), "linear-probe", request(folder)).figures
    assert found["linear_probe/colours/top1"].share.value == 1
    save(folder / "train" / "grey" / "0.png", "red")
    with pytest.raises(UserError, match="differ from those of test"):
        suites.score(ColourModel(), "linear-probe", request(folder))


def labelled(tmp_path, name, numbers):
    rows = []
    for number in numbers:
        colour = list(COLOURS)[number % 3]
        save(tmp_path / f"{number}.png", colour)
        rows.append({"image": f"{number}.png", "label": colour})
    return lines(tmp_path / name, rows)


@pytest.mark.parametrize("suite", ["linear-probe", "fine-tune"])
def test_no_probe_is_trained_on_its_test(tmp_path, folder, suite):
    """Each of these gave 100 % before: train and test were the same pictures."""
    for colour in COLOURS:
        save(tmp_path / "flat" / colour / "0.png", colour)
    flat, file = tmp_path / "flat", labelled(tmp_path, "l.jsonl", range(6))
    for path in (flat, file, f"jsonl:{file}", tmp_path / "*.tar"):
        with pytest.raises(UserError, match=r"has no split test: give --train-data"):
            suites.score(ColourModel(), suite, request(Path(path)))
    with pytest.raises(UserError, match="--train-split test: is the test itself"):
        suites.score(ColourModel(), suite, request(folder, train_split="test"))
    again = labelled(tmp_path, "again.jsonl", range(5, 12))
    with pytest.raises(UserError, match=r"trains on 1 pictures of the test, such as .*/5\.png"):
        suites.score(ColourModel(), suite, request(file, train_data=again))
    with pytest.raises(UserError, match="trains on 3 pictures of the test"):
        suites.score(ColourModel(), suite, request(flat, train_data=tmp_path / "." / "flat"))


def test_a_probe_takes_its_training_from_elsewhere(tmp_path):
    labelled(tmp_path, "l-test.jsonl", range(6))
    train = labelled(tmp_path, "l-train.jsonl", range(6, 18))
    for asked in (
        request(tmp_path / "l-{split}.jsonl"),
        request(tmp_path / "l-test.jsonl", train_data=train),
    ):
        found = suites.score(ColourModel(), "linear-probe", asked).figures
        assert found["linear_probe/colours/top1"].share.value == 1
        assert len(found["linear_probe/colours/top1"].examples) == 6  # pyright: ignore


def test_numbers_of_classes_are_no_names(tmp_path):
    """Prompts such as "a picture of n01440764" give figures that say nothing."""
    for name in ("n01440764", "n01443537"):
        save(tmp_path / "val" / name / "0.png", "red")
    with pytest.raises(UserError, match=r"called by number: give names with --classes FILE"):
        runner.check("imagenet", ("en",), request(tmp_path))
    asked = Request("x", Place(tmp_path, "val"))
    with pytest.raises(UserError, match="n01440764 is called by its number"):
        suites.score(ColourModel(), "zero-shot", asked)


def test_a_suite_refuses_another_kind_of_data(folder, tmp_path):
    with pytest.raises(UserError, match="has labels, not captions: use another suite"):
        suites.score(ColourModel(), "retrieval", request(folder))


def test_every_suite_names_a_reader_that_is_there():
    from m2jax.eval import sets

    for suite in suites.SUITES.values():
        assert not suite.reader or suite.reader in sets.READERS
    assert set(runner.names()) == {*runner.SUITES, *suites.SUITES}


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_features_of_any_batch_are_those_of_all(batch):
    colours = [list(COLOURS)[i % 3] for i in range(7)]
    images = Made(7, lambda row: picture(colours[row]))
    model = ColourModel()
    sizes = set()
    encode = model.encode_image
    model.encode_image = lambda pixels: sizes.add(len(pixels)) or encode(pixels)
    found = features.image_features(model, images, batch=batch)
    expected = encode(np.stack([model.preprocess([picture(c)])[0] for c in colours]))
    np.testing.assert_array_equal(found, expected)
    assert len(sizes) == 1  # one shape is compiled


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_picture_is_read_once_for_all_its_views(batch):
    colours, reads = list(COLOURS)[:3] * 2, []
    images = Made(6, lambda row: reads.append(row) or picture(colours[row]))
    model = ColourModel()
    other = picture(colours[0])
    found = features.image_features(
        model, images, batch=batch, views=lambda image: [image, other, image]
    )
    assert sorted(reads) == list(range(6))
    plain = features.image_features(model, images, batch=batch)
    shown = [plain, np.repeat(plain[:1], 6, axis=0), plain]
    np.testing.assert_array_equal(found, np.stack(shown, axis=1).reshape(18, -1))


def test_an_unreadable_picture_ends_in_its_name(folder):
    (folder / "test" / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png: unreadable image"):
        suites.score(ColourModel(), "zero-shot", request(folder))


def test_tables_and_flat_figures_hold_every_interval(folder):
    found = suites.score(ColourModel(), "zero-shot", request(folder, languages=("en",))).figures
    flat = figures.flat(found)
    assert flat["zero_shot/colours/en/top1_low"] == pytest.approx(metrics.wilson(6, 6).low)
    assert "baseline/chance/colours/top1_low" not in flat  # no chance in it
    shown = tables.table(flat)
    assert "zero_shot/colours/en" in shown
    assert "100.0 (61.0 - 100.0)" in shown
    written = tables.markdown(flat)
    assert "| zero_shot/colours/en | 100.0 (61.0 - 100.0) |" in written
    assert written.count("\n\n") == 1  # chance has a table of its own


def test_figures_of_ratios_are_ratios_of_sums():
    examples = np.array([[[1, 2]], [[3, 3]], [[0, 5]]], np.float32)
    figure = figures.ratios(examples)
    assert figure.share.value == pytest.approx(4 / 10)
