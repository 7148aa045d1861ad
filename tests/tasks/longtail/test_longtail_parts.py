# SPDX-License-Identifier: Apache-2.0
"""Tables, views, fusion and what follows the classifier, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.tasks.longtail import fusion, model, postprocess, table, views
from m2jax.tasks.longtail.model import Data, Settings
from m2jax.tasks.longtail.views import Views

HEADER = "observation_id,endemic,binomial_name,country,code,class_id,file_path\n"
TABLE = HEADER + (
    "7,True,Naja naja,India,IN,10,naja/1.jpg\n"
    "7,False,Naja naja,India,IN,10,naja/2.jpg\n"
    '9,,Bitis arietans,"Kenya, East",KE,2,bitis/3.jpg\n'
)


@pytest.fixture
def made(tmp_path):
    file = tmp_path / "SnakeCLEF2022-TrainMetadata.csv"
    file.write_text(TABLE)
    return file


def test_the_snake_table_and_its_codes(made, tmp_path):
    rows = table.read(made, labelled=True)
    assert rows[0].file == tmp_path / "naja/1.jpg"
    assert [row.observation for row in rows] == ["7", "7", "9"]
    assert rows[2].side == {"code": "KE", "country": "Kenya, East", "endemic": ""}
    codes = table.codes(rows)
    assert codes.classes == ("2", "10")  # by number
    np.testing.assert_array_equal(codes.labels(rows), [1, 1, 0])
    assert codes.width == 2 + 2 + 2
    np.testing.assert_array_equal(codes.side(rows).sum(axis=1), [3, 3, 2])
    np.testing.assert_array_equal(codes.places(rows), [0, 0, 1])


def test_classes_are_all_numbers_or_all_names(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(HEADER + "1,,Naja naja,,,10,a.jpg\n2,,Naja naja,,,,b.jpg\n")
    assert [row.label for row in table.read(file, labelled=False)] == ["10", ""]
    with pytest.raises(UserError, match="line 3: has no class: fill in class_id"):
        table.read(file, labelled=True)
    file.write_text(HEADER + "1,,Naja naja,,,,a.jpg\n2,,Naja naja,,,,b.jpg\n")
    assert [row.label for row in table.read(file, labelled=True)] == ["Naja naja"] * 2


def test_places_that_training_never_had_are_counted_and_are_zeros(made, tmp_path):
    codes = table.codes(table.read(made, labelled=True))
    file = tmp_path / "SnakeCLEF2022-TestMetadata.csv"
    file.write_text(
        "ObservationId,endemic,country,code,file_path\n1,,Narnia,XX,a.jpg\n2,no,,,b.jpg\n"
    )
    rows = table.read(file, labelled=False)
    np.testing.assert_array_equal(codes.places(rows), [postprocess.UNKNOWN] * 2)
    np.testing.assert_array_equal(codes.side(rows).sum(axis=1), [0, 1])
    found = codes.unknown(rows)
    assert found["country"] == {"missing": 1, "unknown": 1}
    assert found["code"] == {"missing": 1, "unknown": 1}
    assert found["endemic"] == {"missing": 1, "unknown": 0}
    with pytest.raises(UserError, match="line 2: has no class"):
        table.read(file, labelled=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no column file_path"),
        ("file_path,code\na.jpg,IN\n", "no column observation_id"),
        (HEADER, "holds no image"),
        (HEADER + ",True,N,India,IN,1,a.jpg\n", "line 2: has no observation id: give the image"),
        (HEADER + "1,maybe,N,India,IN,1,a.jpg\n", "line 2: endemic is 'maybe'"),
        (HEADER + "1,True,N,India,IN,1\n", "line 2: 6 cells under 7 columns"),
        (HEADER + "1,True,N,India,IN,1,../a.jpg\n", "leads out of"),
        (HEADER + "1,True,N,India,IN,1,\n", "no path of an image"),
        (HEADER + "1,True,,India,IN,,a.jpg\n", "line 2: has no class"),
        (HEADER + "1,True,N,India,IN,1,a.jpg\n\n\n1,True,N,India,IN,,b.jpg\n", "line 5: has no cl"),
        (HEADER + '1,True,N,"In\ndia",IN,1,a.jpg\n1,x,N,India,IN,2,b.jpg\n', "line 4: endemic"),
        (
            HEADER[:-1] + ",Class ID\n1,True,N,India,IN,1,a.jpg,2\n",
            "two columns are called 'class_id'",
        ),
    ],
)
def test_tables_that_cannot_be_used_are_refused_by_their_line(tmp_path, text, match):
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=match) as error:
        table.read(file, labelled=True)
    assert "\n" not in str(error.value)


def test_a_class_of_its_own_at_test_and_one_class_alone_are_refused(made, tmp_path):
    rows = table.read(made, labelled=True)
    with pytest.raises(UserError, match="one class alone"):
        table.codes(rows[:2])
    with pytest.raises(UserError, match=r"class '2' of 3.jpg: unknown"):
        table.Codes(("10", "11"), {}).labels(rows)


def test_an_unknown_place_strikes_out_nothing_and_a_known_one_what_it_never_had():
    scores = np.array([[0.6, 0.3, 0.1]] * 4)
    allowed = np.array([[False, True, True], [False, False, False]])
    found = postprocess.filtered(scores, np.array([0, 1, postprocess.UNKNOWN, 0]), allowed)
    np.testing.assert_allclose(found[0], [0, 0.3, 0.1])
    np.testing.assert_allclose(found[1:3], scores[1:3])
    soft = postprocess.filtered(scores, np.zeros(4, int), allowed, soft=0.1)
    np.testing.assert_allclose(soft[0], [0.06, 0.3, 0.1])
    with pytest.raises(ValueError, match="place 2 of 2"):
        postprocess.filtered(scores, np.array([0, 1, 2, 0]), allowed)
    places = np.array([0, 0, postprocess.UNKNOWN])
    np.testing.assert_array_equal(
        postprocess.places_of(places, np.array([1, 2, 0]), 2, 3), [[0, 1, 1], [0, 0, 0]]
    )


def test_images_of_an_observation_are_merged_in_each_way():
    scores = np.array([[0.5, 0.4, 0.1], [0.45, 0.5, 0.05], [0.3, 0.6, 0.1], [0.9, 0.1, 0.0]])
    scores[0, 0] = 0.7
    ids = ["b", "b", "b", "a"]
    best, vote, mean = (postprocess.merged(scores, ids, how) for how in ("best", "vote", "mean"))
    assert best.ids.tolist() == ["a", "b"]
    assert best.classes.tolist() == [0, 0]
    assert vote.classes.tolist() == [0, 1]
    assert mean.classes.tolist() == [0, 1]
    np.testing.assert_allclose(best.scores, [0.9, 0.7])
    np.testing.assert_allclose(vote.scores, [0.9, 0.6])
    order = [3, 1, 0, 2]
    again = postprocess.merged(scores[order], [ids[i] for i in order])
    assert again.classes.tolist() == best.classes.tolist()
    for broken in (None, "", float("nan")):
        with pytest.raises(UserError, match="image 2: has no observation id"):
            postprocess.merged(scores[:2], ["a", broken])
    with pytest.raises(UserError, match="use one of best"):
        postprocess.merged(scores, ids, "worst")


def test_ensembles_weigh_their_models():
    first, second = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    np.testing.assert_allclose(postprocess.ensembled([first, second]), [[0.5, 0.5]])
    np.testing.assert_allclose(postprocess.ensembled([first, second], [3, 1]), [[0.75, 0.25]])
    for models, weights, match in (
        ([], [], "0 weights"),
        ([first, second], [1], "1 weights for 2"),
        ([first, second], [1, -1], "not below 0"),
        ([first, second], [0, 0], "one above it"),
        ([first, second], [1, float("nan")], "not below 0"),
        ([first, second], [1, float("inf")], "not below 0"),
        ([first, np.ones((2, 2))], [], "other images or classes"),
    ):
        with pytest.raises(UserError, match=match):
            postprocess.ensembled(models, weights)


def test_views_of_a_picture():
    image = Image.new("RGB", (40, 20), "white")
    image.putpixel((0, 0), (255, 0, 0))
    assert [v.size for v in views.views(image, Views())] == [(40, 20)]
    kinds = Views((1.0, 2.0), "five", True)
    made = list(views.views(image, kinds))
    assert len(made) == kinds.count == 20
    assert {v.size for v in made} == {(20, 20), (10, 10)}
    red = [v.getpixel((0, 0)) == (255, 0, 0) for v in made]
    mirrored = [v.getpixel((v.width - 1, 0)) == (255, 0, 0) for v in made]
    # The left upper corner: at scale 1 the upper and the lower one are the same.
    assert sum(red) == sum(mirrored) == 3
    for broken in ({"crops": "ten"}, {"scales": (0.5,)}):
        with pytest.raises(UserError, match=next(iter(broken))):
            Views(**broken)


def test_so_many_examples_lose_their_metadata():
    side = jnp.ones((10, 3))
    for share, hidden in ((0.0, 0), (0.34, 3), (1.0, 10)):
        found = fusion.drop_side(side, share, jax.random.key(0))
        assert int((np.asarray(found).sum(axis=1) == 0).sum()) == hidden
    first, second = (fusion.drop_side(side, 0.5, jax.random.key(k)) for k in (0, 1))
    assert (np.asarray(first) != np.asarray(second)).any()


def test_fusion_starts_as_none_and_uses_its_side():
    params = fusion.initialise(jax.random.key(0), 12, 5, hidden=8, narrow=4)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    one, other = (
        fusion.encode_side(params["encoder"], x) for x in (jnp.zeros((3, 5)), jnp.eye(3, 5))
    )
    np.testing.assert_allclose(fusion.fuse(params["fusion"], image, one), image, atol=1e-6)
    params["fusion"]["norm"]["scale"] = jnp.ones(12)
    changed = fusion.fuse(params["fusion"], image, one) - fusion.fuse(
        params["fusion"], image, other
    )
    assert np.abs(changed).max() > 1e-3


def test_rare_classes_are_repeated_as_the_public_code_does():
    labels = np.repeat([0, 1, 2, 3], [60, 30, 8, 2])
    rows = model.repeats(labels, 5)
    # Summed from the smallest, 2 + 8 reaches a tenth at the class of 8: of fewer there is one.
    counts = np.bincount(labels[rows], minlength=5)
    assert counts.tolist() == [60, 30, 8, 2 * (8 // 2 + 1), 0]


@pytest.fixture(scope="module")
def tail():
    """Twelve classes from many to few; metadata tells pairs apart that features confuse."""
    rng = np.random.default_rng(0)
    counts = np.array([90, 60, 40, 30, 20, 14, 10, 8, 6, 5, 4, 3])
    axes = rng.normal(size=(6, 16))

    def draw(counts):
        labels = np.repeat(np.arange(12), counts)
        features = axes[labels // 2] + 0.4 * rng.normal(size=(len(labels), 16))
        side = np.eye(2)[labels % 2]
        return Data(features.astype(np.float32), side.astype(np.float32), labels)

    return draw(counts), draw(np.full(12, 20))


FAST = Settings(epochs=25, batch=64, learning_rate=5e-3)


def accuracy(params, data, settings):
    found = np.asarray(model.logits(params, data.features, data.side, settings)).argmax(axis=1)
    return (found == data.labels).mean(), (found == data.labels)[data.labels >= 8].mean()


@pytest.mark.slow
def test_metadata_and_adjusted_logits_help_where_they_should(tail):
    train, test = tail
    found = {}
    for name, change in (
        ("none", {"side": "none"}),
        ("plain", {"loss": "plain"}),
        ("adjusted", {}),
        ("token", {"side": "token"}),
    ):
        settings = Settings(**{**FAST.__dict__, **change})
        found[name] = accuracy(model.train(train, 12, settings), test, settings)
    assert found["none"][0] < 0.7  # half of what is left is a guess
    assert min(found["adjusted"][0], found["token"][0]) > found["none"][0] + 0.1
    assert found["adjusted"][1] >= found["plain"][1]


@pytest.mark.parametrize("change", [{"loss": "seesaw"}, {"loss": "poly"}, {"loss": "effective"},
                                    {"keep": 0.7, "oversample": True}])  # fmt: skip
def test_every_loss_trains(tail, change):
    train, test = tail
    settings = Settings(**{**FAST.__dict__, **change})
    assert accuracy(model.train(train, 12, settings), test, settings)[0] > 0.5


def test_settings_that_cannot_be_are_refused():
    for broken in (
        *({"side": "late"}, {"loss": "focal"}, {"keep": 0.0}, {"epochs": 0}, {"seed": -1}),
        *({"tau": float("nan")}, {"tau": -1.0}, {"contrast": -0.1}, {"contrast": float("inf")}),
        {"contrast_by": "byol"},
    ):
        with pytest.raises(UserError):
            Settings(**broken)
    assert Settings().trained_adjustment
    assert not Settings(loss="plain").trained_adjustment


def test_the_metadata_token_is_encoded_as_metaformer_does_and_starts_near_none():
    params = fusion.initialise_token(jax.random.key(0), 12, 5, 8)
    side = jnp.eye(3, 5)
    token = fusion.encode_token(params["encoder"], side)
    first = jax.nn.relu(side @ params["encoder"]["first"]["kernel"])
    centred = first - first.mean(axis=1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(axis=1, keepdims=True) + fusion.EPS)
    np.testing.assert_allclose(token, normed, atol=1e-5)  # the block starts as none
    params["encoder"]["block"]["norm2"]["scale"] = jnp.ones(8)
    assert np.abs(fusion.encode_token(params["encoder"], side) - token).max() > 1e-2
    settings = Settings(side="token")
    start = model.initialise(jax.random.key(0), 12, 5, 4, settings)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    alone = model.body(start, rows, side, Settings(side="none"))
    assert 0 < np.abs(model.body(start, rows, side, settings) - alone).max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("by", "side"), [("simclr", "dynamic"), ("moco", "token")])
def test_views_without_labels_are_contrasted_beside_the_labels(tail, by, side):
    train, test = tail
    rng = np.random.default_rng(3)
    alone = Settings(**{**FAST.__dict__, "side": side})
    settings = Settings(**{**alone.__dict__, "contrast": 0.01, "contrast_by": by})
    start = model.initialise(jax.random.key(0), 16, 2, 12, settings)
    plain = model.initialise(jax.random.key(0), 16, 2, 12, alone)
    rows = jnp.asarray(test.features[:4]), jnp.asarray(test.side[:4])
    np.testing.assert_allclose(  # the block starts as none
        model.body(start, *rows, settings), model.body(plain, *rows, alone), atol=1e-6
    )
    noise = 0.1 * rng.normal(size=(2, *test.features.shape))
    pairs = model.Pairs((test.features + noise).swapaxes(0, 1).astype(np.float32), test.side)
    trained = model.train(train, 12, settings, pairs)
    few = model.Pairs(pairs.features[:40], pairs.side[:40])

    def contrast(params, pairs):
        return model.contrasted(params, pairs, settings, params if by == "moco" else None)

    assert contrast(trained, few) < contrast(start, few)
    assert accuracy(trained, test, settings)[0] > 0.5
    wrong = model.Pairs(few.features.copy(), few.side)
    wrong.features[:, 1] = np.roll(wrong.features[:, 1], 1, axis=0)
    assert contrast(trained, wrong) > contrast(trained, few)
    with pytest.raises(UserError, match="needs two images"):
        model.train(train, 12, settings)


@pytest.mark.slow
def test_the_slow_encoder_gives_the_keys_gets_no_gradient_and_follows(tail):
    settings = Settings(side="none", contrast=1.0, contrast_by="moco")
    keys = jax.random.split(jax.random.key(0), 2)
    params, slow = (model.initialise(key, 16, 2, 12, settings) for key in keys)
    rows = np.stack([tail[1].features[:12], tail[1].features[12:24]], axis=1)
    pairs = model.Pairs(rows, tail[1].side[:12])
    mirrored = model.Pairs(rows[:, ::-1], tail[1].side[:12])
    value = model.contrasted(params, pairs, settings, slow)
    np.testing.assert_allclose(  # symmetric: which view is first does not count
        model.contrasted(params, mirrored, settings, slow), value, rtol=1e-5
    )
    assert abs(model.contrasted(params, pairs, settings, params) - value) > 1e-3
    gradient = jax.grad(lambda both: model.contrasted(both[0], pairs, settings, both[1]))
    of_params, of_slow = gradient((params, slow))
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(of_slow))
    assert np.abs(of_params["predict"]["norm2"]["scale"]).max() > 0
    with pytest.raises(ValueError, match="slow encoder"):
        model.contrasted(params, pairs, settings)
    for progress, share in ((0.0, 0.01), (0.5, 0.005), (1.0, 0.0)):
        found = model.followed(slow, params, progress)
        want = jax.tree.map(lambda a, b, m=share: (1 - m) * a + m * b, slow, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, want)


def test_every_step_moves_the_slow_encoder(tail, monkeypatch):
    moved = []
    real = model.followed
    monkeypatch.setattr(model, "followed", lambda *given: moved.append(given[2]) or real(*given))
    rows = np.stack([tail[1].features] * 2, axis=1)
    for by, traced in (("simclr", 0), ("moco", 1)):
        settings = Settings(side="none", epochs=2, batch=128, contrast=0.5, contrast_by=by)
        model.train(tail[0], 12, settings, model.Pairs(rows, tail[1].side))
        assert len(moved) == traced


def test_a_residual_block_tells_classes_that_no_line_divides():
    rng = np.random.default_rng(0)
    features = rng.choice([-1.0, 1.0], (512, 8)).astype(np.float32)
    labels = (features[:, 0] * features[:, 1] > 0).astype(np.int64)
    data = model.Data(features, np.zeros((512, 2), np.float32), labels)
    found = {}
    for block in (False, True):
        change = {"side": "none", "loss": "plain", "block": block, "learning_rate": 5e-2}
        settings = Settings(**{**FAST.__dict__, **change})
        params = model.train(data, 2, settings)
        scores = model.logits(params, jnp.asarray(features), jnp.asarray(data.side), settings)
        found[block] = (np.asarray(scores).argmax(1) == labels).mean()
    assert found[False] < 0.65 < 0.95 < found[True]
