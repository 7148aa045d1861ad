# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from m2jax.bundle import Bundle
from m2jax.config import Model, UserError, resolve
from m2jax.data.image import Preprocess
from m2jax.dist.mesh import local_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.eval import finetune, suites
from m2jax.eval.finetune import Recipe
from m2jax.eval.sets.records import Made, Place
from m2jax.models import params as params_lib
from tests.eval.pictures import COLOURS, ColourModel, picture, save
from tests.models import dual_toys

TINY = Model(
    **{"width": 16, "heads": 2, "out_dim": 8, "vocab_size": 32, "text_positions": 16},
    **{"image_size": 16, "dtype": "float32", "init": "scaled"},
)
RECIPE = Recipe(epochs=6, batch=6, learning_rate=3e-3)


@pytest.fixture(scope="module")
def bundle():
    cfg = resolve(TINY)
    params = jax.jit(lambda: params_lib.initialise(cfg, jax.random.key(0)))()
    return Bundle(cfg, params_lib.abstract(cfg).graph, params, None, Preprocess(16))


def colours(count):
    labels = np.arange(count) % 3
    return Made(count, lambda row: picture(list(COLOURS)[labels[row]])), labels


def test_it_learns_and_leaves_the_model_as_it_was(bundle):
    before = jax.tree.map(np.array, bundle.params)
    images, labels = colours(12)
    tuned = finetune.train(bundle, images, labels, 3, recipe=RECIPE)
    assert len(tuned.losses) == 12
    assert tuned.losses[0] == pytest.approx(np.log(3), abs=1e-5)  # the head starts at zero
    assert tuned.losses[-1] < 0.75 * tuned.losses[0]
    more, truth = colours(7)
    for batch in (3, 7, 50):
        assert (finetune.ranks(tuned, bundle, more, truth, batch=batch) == 0).all()
    jax.tree.map(np.testing.assert_array_equal, before, bundle.params)
    again = finetune.train(bundle, images, labels, 3, recipe=RECIPE)
    assert again.losses == tuned.losses


@pytest.mark.slow
def test_the_devices_share_its_batches_and_the_losses_stay(bundle):
    mesh = local_mesh(2)
    places = params_lib.shardings(params_lib.abstract(bundle.config), mesh, AxisRules())
    params = jax.tree.map(jax.device_put, bundle.params, places)
    shared = dataclasses.replace(bundle, params=params)
    images, labels = colours(16)
    for batch in (8, 6):  # shared, and whole on each of the eight
        recipe = RECIPE._replace(epochs=2, batch=batch)
        one, other = (
            finetune.train(model, images, labels, 3, recipe=recipe) for model in (bundle, shared)
        )
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
        first = finetune.ranks(other, shared, images, labels, batch=5)
        np.testing.assert_array_equal(first, finetune.ranks(one, bundle, images, labels, batch=5))
        spread = finetune._placed(shared, np.zeros((batch, 16, 16, 3), np.float32))
        assert (isinstance(spread, jax.Array) and len(spread.addressable_shards) == 8) == (
            batch == 8
        )


def test_pictures_are_flipped_left_to_right_and_never_upside_down(bundle, monkeypatch):
    """A picture with red on its left and green on top: each flip is another picture."""
    drawn = np.zeros((16, 16, 3), np.uint8)
    drawn[:, :8, 0] = 255
    drawn[:8, :, 1] = 255
    images = Made(8, lambda row: Image.fromarray(drawn))
    seen = []

    def step(*made):
        def run(params, state, pixels, labels):
            seen.extend(np.array(pixels))
            return params, state, 0.0

        return run

    monkeypatch.setattr(finetune, "_step", step)
    finetune.train(bundle, images, np.arange(8) % 2, 2, recipe=Recipe(epochs=4, batch=4))
    [plain] = bundle.preprocess([Image.fromarray(drawn)])
    [mirrored] = bundle.preprocess([Image.fromarray(drawn[:, ::-1])])
    kinds = [[np.array_equal(each, kind) for kind in (plain, mirrored)] for each in seen]
    assert len(kinds) == 32
    assert all(sum(kind) == 1 for kind in kinds)
    assert 6 <= sum(kind[1] for kind in kinds) <= 26  # half of them, by chance


@pytest.mark.parametrize("family", ["m2", "clip"])
def test_all_that_makes_an_image_feature_moves_and_nothing_else(bundle, family):
    """Full fine-tuning. What makes a feature is asked of the gradient itself."""
    if family == "clip":
        cfg = dual_toys.TOYS[family]
        graph, params = params_lib.abstract(cfg).graph, dual_toys.random_params(cfg)
        bundle = Bundle(cfg, graph, params, None, Preprocess(cfg.vision.image_size))
    images, labels = colours(12)
    tuned = finetune.train(bundle, images, labels, 3, recipe=Recipe(epochs=2, batch=6))
    old, new = (params_lib.flatten(p) for p in (bundle.params, tuned.params))
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    pixels = bundle.preprocess([images.read(row) for row in range(3)])
    weights = np.random.default_rng(0).normal(size=tuned.head["kernel"].shape[0])

    def summed(params):
        return (params_lib.bind(bundle.graph, params).encode_image(pixels).features @ weights).sum()

    slopes = params_lib.flatten(jax.jit(jax.grad(summed))(bundle.params))
    read = {name for name, slope in slopes.items() if np.abs(slope).max() > 0}
    # A bias on all keys shifts every logit of a softmax alike: its slope is rounding.
    assert {n for n in moved ^ read if not n.endswith("k.bias")} == set()


def test_only_a_loaded_model_can_be_tuned(bundle, tmp_path):
    images, labels = colours(6)
    with pytest.raises(UserError, match=r"needs a model from m2jax\.load"):
        finetune.train(ColourModel(), images, labels, 3)
    for split in ("train", "test"):
        for number, colour in enumerate([*COLOURS] * 2):
            save(tmp_path / split / colour / f"{number}.png", colour)
    request = suites.Request("x", Place(tmp_path), batch=4)
    found = suites.score(bundle, "fine-tune", request).figures
    assert set(found) == {"fine_tune/x/top1", "fine_tune/x/mean_per_class"}
    with pytest.raises(UserError, match="lower --learning-rate"):
        finetune.train(bundle, images, labels, 3, recipe=Recipe(4, 6, learning_rate=1e30))
