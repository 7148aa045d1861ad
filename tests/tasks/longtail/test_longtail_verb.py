# SPDX-License-Identifier: Apache-2.0
"""``m2jax longtail`` from a table to observations, on a toy model."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import m2jax
from m2jax.checkpoint import folder
from m2jax.cli.main import main
from m2jax.config import Model, UserError, resolve
from m2jax.data.image import Preprocess
from m2jax.models import params as params_lib
from m2jax.tasks.longtail import recipe, saved, table
from m2jax.tasks.longtail.views import Views

MODEL = resolve(
    Model(
        **{"width": 16, "heads": 2, "out_dim": 8, "vocab_size": 100, "text_positions": 16},
        **{"image_size": 16, "max_text_len": 8, "dtype": "float32", "init": "scaled"},
    )
)
COLOURS = ((220, 20, 20), (20, 200, 20), (20, 20, 220))
HEADER = "observation_id,endemic,country,code,class_id,file_path"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params = jax.jit(lambda: params_lib.initialise(MODEL, jax.random.key(0)))()
    path = tmp_path_factory.mktemp("models") / "toy"
    folder.write(path, MODEL, params, tokenizer=None, preprocess=Preprocess(16).to_dict())
    return path


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """Three classes of plain colours; each lives in one country."""
    base = tmp_path_factory.mktemp("longtail")
    lines = [HEADER]
    for number in range(18):
        label = (0, 0, 0, 1, 1, 2)[number // 2 % 6]  # one class per observation
        jitter = np.random.default_rng(number).integers(-15, 15, 3)
        colour = tuple(int(x) for x in np.clip(COLOURS[label] + jitter, 0, 255))
        Image.new("RGB", (24, 20), colour).save(base / f"{number}.png")
        lines.append(f"{number // 2},,Country {label},C{label},{label},{number}.png")
    (base / "train.csv").write_text("\n".join(lines) + "\n")
    words = ["longtail", "train", "--model", str(model), "--table", str(base / "train.csv")]
    assert main([*words, "--out", str(base / "a"), "--epochs", "30"]) == 0
    assert main([*words, "--out", str(base / "b"), "--loss", "plain", "--side", "none",
                 "--epochs", "30"]) == 0  # fmt: skip
    return base


def predict(model, base, tmp_path, *extra):
    return main(
        ["longtail", "predict", "--model", str(model), "--classifier", str(base / "a"),
         "--table", str(base / "train.csv"), "--out", str(tmp_path / "x.json"), *extra]
    )  # fmt: skip


def test_from_a_table_to_observations_and_their_page(model, trained, tmp_path, capsys):
    page = tmp_path / "x.html"
    assert predict(model, trained, tmp_path, "--html", str(page), "--one-view") == 0
    assert "9 observations: macro_f1" in capsys.readouterr().out
    content = json.loads((tmp_path / "x.json").read_text())
    assert len(content["observations"]) == 9
    for each in content["observations"]:
        assert len(each["images"]) == 2
        best = max(each["images"], key=lambda image: image["score"])
        assert (each["class"], each["score"]) == (best["class"], best["score"])
    assert set(content["figures"]) >= {"macro_f1", "macro_f1_all_classes", "accuracy"}
    assert content["metadata"]["endemic"] == {"missing": 18, "unknown": 0}
    assert page.read_text().count("<img") == 18


def test_a_momentum_encoder_on_images_without_labels(model, trained, tmp_path, capsys):
    (trained / "more.csv").write_text(f"{HEADER}\n1,,,,,0.png\n2,,,,,1.png\n")
    words = ["longtail", "train", "--model", str(model), "--table", str(trained / "train.csv")]
    words += ["--unlabelled", str(trained / "more.csv"), "--epochs", "3", "--contrast-by", "moco"]
    words += ["--side", "none"]
    assert main([*words, "--out", str(tmp_path / "c")]) == 2
    assert "--contrast-by moco: serves --contrast alone" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "c"), "--contrast", "0.01", "--block"]) == 0
    found = saved.read(tmp_path / "c")
    assert found.settings.contrast_by == "moco"
    assert "predict" in found.params
    out = tmp_path / "x"
    out.mkdir()
    assert predict(model, trained, out, "--classifier", str(tmp_path / "c"), "--one-view") == 0


def test_a_place_that_training_never_had_is_said_and_filters_nothing(model, trained, tmp_path):
    lines = [HEADER.replace("class_id,", ""), "1,,Narnia,XX,0.png", "2,,,,1.png"]
    (trained / "test.csv").write_text("\n".join(lines) + "\n")
    words = ["--table", str(trained / "test.csv"), "--one-view"]
    assert predict(model, trained, tmp_path, *words) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["metadata"]["country"] == {"missing": 1, "unknown": 1}
    assert [o["images"][0]["place"] for o in content["observations"]] == [None, None]
    assert "figures" not in content
    assert all(o["score"] > 0 for o in content["observations"])


def test_the_filter_keeps_to_the_classes_of_the_place(model, trained):
    backbone = m2jax.load(model)
    found = saved.read(trained / "a")
    rows = table.read(trained / "train.csv", labelled=True)
    moved = [
        table.Row(row.file, row.observation, {**row.side, "code": "C1"}, row.label) for row in rows
    ]
    steps = recipe.Steps(Views(), 0.0, True, "best")
    result = recipe.predict(backbone, [found], moved, steps)
    assert (result.observations.classes == 1).all()
    everywhere = recipe.predict(backbone, [found], moved, steps.__class__(Views(), 0.0, False))
    assert (everywhere.scores.sum(axis=1) > 0.999).all()


def test_several_classifiers_and_views_are_averaged(model, trained, tmp_path):
    backbone = m2jax.load(model)
    both = [saved.read(trained / name) for name in ("a", "b")]
    rows = table.read(trained / "train.csv", labelled=True)
    steps = recipe.Steps(Views(mirror=True), 0.0, False)
    single = [recipe.predict(backbone, [each], rows, steps).scores for each in both]
    mean = recipe.predict(backbone, both, rows, steps, weights=[3, 1]).scores
    np.testing.assert_allclose(mean, (3 * single[0] + single[1]) / 4, atol=1e-6)


def test_shares_are_not_taken_off_twice(model, trained, tmp_path, capsys):
    assert predict(model, trained, tmp_path, "--tau", "0.7", "--one-view") == 2
    assert "was trained with adjusted logits: take 0" in capsys.readouterr().err
    assert predict(
        model, trained, tmp_path, "--classifier", str(trained / "b"), "--one-view"
    ) == 0  # fmt: skip


def test_the_verb_takes_shares_off_where_training_did_not_and_merges_as_told(
    model, trained, tmp_path, monkeypatch
):
    taken = []
    real = recipe.predict

    def caught(backbone, saved, rows, steps, **options):
        taken.append((steps.tau, steps.place_filter, steps.merge, options["weights"]))
        return real(backbone, saved, rows, steps, **options)

    monkeypatch.setattr(recipe, "predict", caught)
    b = ["--classifier", str(trained / "b"), "--one-view"]
    for extra in (
        ["--one-view"],
        b,
        [*b, "--tau", "0.2", "--no-filter", "--merge", "vote", "--weights", "3"],
    ):
        assert predict(model, trained, tmp_path, *extra) == 0
    assert taken == [
        (0.0, True, "best", []),
        (recipe.TAU, True, "best", []),
        (0.2, False, "vote", [3.0]),
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--weights", "1,2"], "2 weights for 1"), (["--tau", "0.7"], "with adjusted logits: take 0")],
)
def test_no_image_is_read_for_steps_that_cannot_be(
    model, trained, tmp_path, capsys, extra, message
):
    (trained / "gone.csv").write_text(f"{HEADER}\n1,,,,1,none.png\n")
    assert predict(model, trained, tmp_path, "--table", str(trained / "gone.csv"), *extra) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--merge", "worst"], "use one of best, vote, mean"),
        (["--weights", "a"], "write numbers"),
        (["--weights", "1,2", "--one-view"], "2 weights for 1 models"),
        (["--weights", "nan", "--one-view"], "not below 0, one above it"),
        (["--tau", "nan"], "--tau nan: must be a number not below 0"),
        (["--tau", "-3"], "--tau -3.0: must be a number not below 0"),
        (["--classifier", "none"], "name a folder made by longtail train"),
        (["--batch-size", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, trained, tmp_path, capsys, extra, message):
    assert predict(model, trained, tmp_path, *extra) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1]
    assert not list(tmp_path.iterdir())


def test_an_unknown_class_and_one_file_for_both_are_refused_first(model, trained, tmp_path, capsys):
    (trained / "zebra.csv").write_text(f"{HEADER}\n1,,Narnia,XX,zebra,none.png\n")
    assert predict(model, trained, tmp_path, "--table", str(trained / "zebra.csv")) == 2
    assert "class 'zebra' of none.png: unknown" in capsys.readouterr().err
    (trained / "two.csv").write_text(f"{HEADER}\n1,,,,1,none.png\n2,,,,1,b.png\n1,,,,2,c.png\n")
    assert predict(model, trained, tmp_path, "--table", str(trained / "two.csv")) == 2
    assert "observation 1: its images are of two classes" in capsys.readouterr().err
    assert predict(model, trained, tmp_path, "--html", str(tmp_path / "x.json")) == 2
    assert "is --out too" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_classifier_is_refused(model, trained, tmp_path):
    found = saved.read(trained / "a")
    saved.write(tmp_path / "c", found)
    again = saved.read(tmp_path / "c")
    assert again.codes == found.codes
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    card = json.loads((tmp_path / "c" / saved.LAYOUT.card).read_text())
    for change, match in (
        ("{", "damaged"),
        (json.dumps({"format": 0}), "another format"),
        (json.dumps(card | {"classes": ["a"]}), "damaged"),
        (json.dumps(card | {"classes": ["0", "1", "1"]}), "a name twice"),
        (json.dumps(card | {"settings": {**card["settings"], "side": "token"}}), "damaged"),
    ):
        (tmp_path / "c" / saved.LAYOUT.card).write_text(change)
        with pytest.raises(UserError, match=match):
            saved.read(tmp_path / "c")
    backbone = m2jax.load(model)
    other = type(found)(**{**found.__dict__, "model": "other"})
    rows = table.read(trained / "train.csv", labelled=True)
    with pytest.raises(UserError, match="trained on another model"):
        recipe.predict(backbone, [other], rows, recipe.Steps(Views()))
    codes = table.Codes((*found.codes.classes[:2], "9"), found.codes.values)
    with pytest.raises(UserError, match="cannot be one ensemble"):
        recipe.predict(
            backbone, [found, type(found)(**{**found.__dict__, "codes": codes})], rows,
            recipe.Steps(Views()),
        )  # fmt: skip
