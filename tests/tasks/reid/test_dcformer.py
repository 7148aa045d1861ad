# SPDX-License-Identifier: Apache-2.0
"""The task in the trainer's own step, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from m2jax import config
from m2jax.config import UserError
from m2jax.config_dual import Dual, Text, Vision
from m2jax.dist.sharding import batch_sharding
from m2jax.losses.diversity import dcformer_loss
from m2jax.models import params as params_lib
from m2jax.models.class_tokens import ClassTokens, from_vision_tower
from m2jax.models.dual import DualEncoder
from m2jax.tasks.reid import dcformer, train
from m2jax.tasks.reid.dcformer import DCFormerTask, Settings
from m2jax.train.step import make_step
from m2jax.train.task import Task
from tests.losses.reductions import mesh_of

TOWER = ClassTokens(
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    tokens=3,
    height=16,
    image_width=8,
    patch_size=4,
    stride=(4, 2),
)
PLAIN = Settings(tower=TOWER, identities=4, steps=10, erase=0.0, gray=0.0, flip=0.0, pad=0)


def batch(n=16, seed=0):
    """Identities are colours, cameras are brightness."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(4), n // 4)
    camera = np.tile(np.arange(2), n // 2)
    colours = rng.integers(30, 200, (4, 1, 1, 3))
    image = colours[identity] + 20 * camera[:, None, None, None]
    image = image + rng.integers(0, 20, (n, 16, 8, 3))
    found = {"image": image.astype(np.uint8), "identity": identity, "camera": camera}
    found["step"] = np.full(n, 5)  # of 10 in PLAIN: the reversed gradient is at 0.987
    return {name: jnp.asarray(value) for name, value in found.items()}


def losses(cfg, mesh_name, steps):
    mesh = mesh_of(mesh_name)
    task = DCFormerTask(cfg, mesh)
    experiment = config.Experiment(
        optim=config.Optim(learning_rate=3e-3, warmup_steps=0),
        train=config.Train(steps=steps),
        data=config.Data(batch_size=16),
    )
    step = make_step(experiment, task, mesh)
    state, found = step.init(), []
    placed = jax.device_put(batch(), batch_sharding(mesh))
    for _ in range(steps):
        state, metrics = step.run(state, placed)
        found.append({name: float(value) for name, value in metrics.items()})
    return found, task


@pytest.mark.slow
def test_eight_devices_train_as_one():
    """The hardest pairs of the global batch, by the trainer's own step."""
    one, task = losses(PLAIN, 1, 12)
    eight, _ = losses(PLAIN, "ring of 8", 2)
    assert isinstance(task, Task)
    for a, b in zip(one, eight, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    assert one[-1]["loss/diverse"] < one[0]["loss/diverse"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["reversal", "confusion"])
def test_scenes_come_out_of_the_features_alone(form):
    """The classifier of scenes learns the same with and without a weight on what features get."""
    made = [
        DCFormerTask(dataclasses.replace(PLAIN, scenes=form, cameras=2, scene_weight=weight))
        for weight in (0.0, 5.0)
    ]
    params = made[0].init(jax.random.key(0))
    shape = params["scene"]["kernel"].shape
    params["scene"]["kernel"] = jax.random.normal(jax.random.key(1), shape)
    grads = [
        jax.grad(lambda p, task=task: task.loss(p, batch(), jax.random.key(2))[0])(params)
        for task in made
    ]
    told = [grad["scene"]["kernel"] for grad in grads]
    np.testing.assert_allclose(*told, atol=1e-5)
    towers = [params_lib.flatten(g["tower"])["cls_tokens"] for g in grads]
    assert np.abs(towers[0] - towers[1]).max() > 1e-4


@pytest.mark.slow
def test_the_reversed_gradient_rises_over_the_run():
    """Nothing at the first step, and as much more at a later one as AdvBCT's ramp says."""
    cfg = dataclasses.replace(PLAIN, scenes="reversal", cameras=2, scene_weight=5.0)
    made = [DCFormerTask(dataclasses.replace(cfg, scene_weight=w)) for w in (0.0, 5.0)]
    params = made[0].init(jax.random.key(0))
    shape = params["scene"]["kernel"].shape
    params["scene"]["kernel"] = jax.random.normal(jax.random.key(1), shape)

    def felt(step):
        given = batch() | {"step": jnp.full(16, step)}
        grads = [
            jax.grad(lambda p, task=task: task.loss(p, given, jax.random.key(2))[0])(params)
            for task in made
        ]
        first, second = (np.asarray(grad["tower"]["cls_tokens"]) for grad in grads)
        return second - first

    early, late = felt(1), felt(8)
    assert np.abs(felt(0)).max() < 1e-6
    ramp = [2 / (1 + np.exp(-10 * step / 10)) - 1 for step in (1, 8)]
    np.testing.assert_allclose(early, late * ramp[0] / ramp[1], rtol=1e-3, atol=1e-5)


def test_settings_that_exclude_each_other():
    with pytest.raises(UserError, match="use one of none"):
        DCFormerTask(dataclasses.replace(PLAIN, scenes="all"))
    with pytest.raises(UserError, match="needs two cameras"):
        DCFormerTask(dataclasses.replace(PLAIN, scenes="reversal", cameras=1))
    sided = dataclasses.replace(TOWER, cameras=2)
    with pytest.raises(UserError, match="side information"):
        DCFormerTask(dataclasses.replace(PLAIN, tower=sided, scenes="reversal", cameras=2))
    with pytest.raises(UserError, match="do not fit together"):
        DCFormerTask(dataclasses.replace(PLAIN, tower=dataclasses.replace(TOWER, heads=3)))


def test_the_loss_is_dcformers():
    """Each token by a norm and a classifier of its own, with cameras, DWC and its weight."""
    tower = dataclasses.replace(TOWER, cameras=2)
    task = DCFormerTask(dataclasses.replace(PLAIN, tower=tower, dynamic=True, diversity=0.25))
    params, given = task.init(jax.random.key(0)), batch()
    heads = params["heads"]
    rng = np.random.default_rng(0)
    heads["scale"] = jnp.asarray(rng.uniform(0.5, 2, (3, 16)), jnp.float32)
    heads["kernel"] = jnp.asarray(rng.normal(size=(3, 16, 4)), jnp.float32)
    pixels = dcformer.normalised(given["image"], task.cfg)
    tokens = params_lib.bind(task.model.graph, params).tower(pixels, given["camera"])
    logits = [
        (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * heads["scale"][k] @ heads["kernel"][k]
        for k, x in enumerate(np.moveaxis(np.asarray(tokens), 1, 0))
    ]
    wanted = dcformer_loss(
        tokens, jnp.stack(logits, 1), given["identity"], dynamic=True, weight=0.25
    )
    found, metrics = task.loss(params, given, jax.random.key(1))
    assert float(found) == pytest.approx(float(wanted.total), rel=1e-4)
    assert float(metrics["loss/identity"]) == pytest.approx(float(wanted.identity.mean()), rel=1e-4)
    assert float(metrics["loss/diverse"]) == pytest.approx(float(wanted.diverse), rel=1e-4)


CLIPS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def test_each_change_is_the_published_one():
    """Mirrored left to right, gray or noise in a rectangle and not elsewhere, crops all round.

    Gray is Pillow's and what is outside is black, whatever the pixels are standardised by.
    """
    before = np.random.default_rng(5).integers(0, 256, (64, 16, 8, 3), np.uint8)

    def changed(**shares):
        cfg = dataclasses.replace(PLAIN, **CLIPS, **shares)
        return np.asarray(
            dcformer.augment(
                jnp.asarray(before), cfg, lambda x: dcformer.normalised(x, cfg), jax.random.key(0)
            )
        )

    def pictures(**shares):
        """What was changed, as pictures."""
        raw = 255 * (changed(**shares) * np.array(CLIPS["std"]) + np.array(CLIPS["mean"]))
        np.testing.assert_allclose(raw, raw.round(), atol=1e-3)
        return raw.round()

    def inside_of(found, was):
        """Where they differ, which is a rectangle."""
        here = (found != was).any(-1)
        rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
        assert here.sum() == len(rows) * len(columns)
        return here

    np.testing.assert_array_equal(pictures(flip=1.0), before[:, :, ::-1])
    some = 0
    for image, was in zip(pictures(gray=1.0), before, strict=True):
        here = inside_of(image, was)
        some += here.any()
        gray = np.asarray(Image.fromarray(was).convert("L"))
        np.testing.assert_array_equal(image[here], np.tile(gray[here][:, None], 3))
    assert some > 57
    still, erased = changed(), changed(erase=1.0)
    inside = np.stack([inside_of(*two) for two in zip(erased, still, strict=True)])
    assert inside.any((1, 2)).sum() > 57
    assert 0.9 < erased[inside].std() < 1.1
    black = np.pad(before, ((0, 0), (3, 3), (3, 3), (0, 0)))
    seen = set()
    for image, wide in zip(pictures(pad=3), black, strict=True):
        at = [
            (down, right)
            for down in range(7)
            for right in range(7)
            if np.array_equal(wide[down : down + 16, right : right + 8], image)
        ]
        assert len(at) == 1
        seen |= {*at}
    for axis in range(2):
        assert {place[axis] for place in seen} == {*range(7)}


def test_rectangles_and_crops_stay_inside():
    masks = np.asarray(dcformer.rectangles(jax.random.key(0), 200, 20, 10, 0.5))
    shares = masks.mean((1, 2))
    assert 0.3 < (shares > 0).mean() < 0.7
    assert shares.max() <= 0.4
    for mask in masks[shares > 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # one whole rectangle
    changed = dataclasses.replace(PLAIN, flip=0.5, pad=3, gray=1.0, erase=0.5)
    images = batch()["image"]

    def standardised(x):
        return dcformer.normalised(x, PLAIN)

    found = dcformer.augment(images, changed, standardised, jax.random.key(0))
    assert found.shape == images.shape
    same = dcformer.augment(images, PLAIN, standardised, jax.random.key(0))
    np.testing.assert_array_equal(same, standardised(images))


def test_biases_learn_twice_as_fast_by_sgd():
    recipe = train.Recipe(epochs=9)
    rule = train.optimizer_of(recipe, train._experiment(recipe, 9, 1), 1).transform
    params = {"fc": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}}
    updates, _ = rule.update(jax.tree.map(jnp.ones_like, params), rule.init(params), params)
    rate = 0.008 * (0.01 + 0.99 / 5)
    np.testing.assert_allclose(updates["fc"]["kernel"], -rate, rtol=1e-5)
    np.testing.assert_allclose(updates["fc"]["bias"], -2 * rate, rtol=1e-5)


def clip(pre_norm=True):
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32}
    vision = Vision(**sizes, image_size=16, patch_size=4, pre_norm=pre_norm)
    return Dual(vision=vision, text=Text(**sizes, vocab_size=32, positions=4), out_dim=8)


def test_a_clip_tower_to_start_from():
    """Tokens begin alike but for their positions; the first step tells them apart."""
    source = nnx.to_pure_dict(nnx.state(DualEncoder(clip(), nnx.Rngs(0))))["vision"]
    tower = dataclasses.replace(TOWER, pre_norm=True, activation="quick_gelu", eps=1e-5)
    task = DCFormerTask(dataclasses.replace(PLAIN, tower=tower), start=source)
    params = task.init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, task.model.params)
    assert jax.tree.map(jnp.shape, params) == shapes
    taken = params["tower"]
    np.testing.assert_array_equal(taken["cls_tokens"], np.tile(source["cls_token"], (3, 1)))
    assert np.abs(np.diff(np.asarray(taken["positions"])[:3], axis=0)).min(1).max() > 0
    tokens = params_lib.bind(task.model.graph, params).tower(jnp.ones((2, 16, 8, 3)))
    assert np.abs(tokens[:, 0] - tokens[:, 1]).max() > 1e-3
    with pytest.raises(UserError, match="pre_norm=False but the tower has one"):
        from_vision_tower(source, TOWER, jax.random.key(0))
    thin = dataclasses.replace(tower, mlp_width=16)
    with pytest.raises(UserError, match="differ from the config's"):
        from_vision_tower(source, thin, jax.random.key(0))
    pooled = {name: value for name, value in source.items() if name != "cls_token"}
    with pytest.raises(UserError, match="no class token"):
        from_vision_tower(pooled, tower, jax.random.key(0))
