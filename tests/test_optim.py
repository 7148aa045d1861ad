# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2jax import optim
from m2jax.config import Mesh, Model, Optim, resolve
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.models import params as params_lib

TINY = resolve(Model(width=16, heads=2, out_dim=8, vocab_size=32, text_positions=16, image_size=16))


def tree():
    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), params_lib.abstract(TINY).params)


def test_every_parameter_of_the_model_has_a_group():
    found = params_lib.flatten(optim.groups(params_lib.abstract(TINY).params))
    assert set(found.values()) == {optim.DECAYED, optim.PLAIN}
    assert found["logit_scale"] == optim.PLAIN
    assert found["backbone.blocks.A.attn_norm.scale"] == optim.PLAIN
    assert found["backbone.blocks.A.q.kernel"] == optim.DECAYED


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="new_thing"):
        optim.groups({"new_thing": jnp.ones(3)})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_zero_gradients_decay_matrices_alone_and_leave_the_frozen(name):
    cfg = Optim(name=name, warmup_steps=0, schedule="constant", weight_decay=0.5)
    frozen = "vl.blocks.B"
    rule = optim.make_optimizer(cfg, 10, frozen=lambda n: n.startswith(frozen)).transform
    params = tree()
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(rule.update)(grads, rule.init(params), params)
    moved = {n: float(jnp.abs(u).max()) for n, u in params_lib.flatten(updates).items()}
    for leaf, change in moved.items():
        hidden = leaf.endswith("kernel") and "vision_embed" not in leaf
        decayed = hidden if name == "muon" else optim.group(leaf) == optim.DECAYED
        assert (change > 0) == (decayed and not leaf.startswith(frozen)), leaf


def test_frozen_parameters_have_no_moments():
    cfg = Optim()
    whole = optim.make_optimizer(cfg, 10).transform.init(tree())
    part = optim.make_optimizer(cfg, 10, frozen=lambda n: n.startswith("vl.")).transform
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (whole, part.init(tree()))]
    vl = sum(x.size for n, x in params_lib.flatten(tree()).items() if n.startswith("vl."))
    assert sizes[0] - sizes[1] == 2 * vl


def test_schedule_warms_up_to_the_peak_and_ends():
    schedule = optim.make_schedule(Optim(learning_rate=1.0, warmup_steps=10, end_factor=0.1), 110)
    np.testing.assert_allclose(
        [schedule(0), schedule(5), schedule(10), schedule(110)], [0, 0.5, 1, 0.1], atol=1e-6
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    mesh = make_mesh(Mesh(data=2, fsdp=2, model=2))
    model = params_lib.abstract(TINY)
    places = params_lib.shardings(model, mesh, AxisRules())
    rule = optim.make_optimizer(Optim(name=name), 10).transform
    found = optim.state_shardings(rule, model.params, places, mesh)
    shapes = jax.eval_shape(rule.init, model.params)
    for shape, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True):
        if shape.shape == (2, 16, 64) and name != "adafactor":
            assert place.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
    jax.jit(rule.init, out_shardings=found).lower(model.params)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_schedules_follow_the_step_and_not_the_updates(name):
    cfg = Optim(name=name, warmup_steps=4, schedule="linear", weight_decay=0.0)
    params = {"blocks.fc1.kernel": jnp.ones((4, 4)), "norm.scale": jnp.ones(4)}
    grads = jax.tree.map(lambda leaf: jnp.linspace(0.5, 1, leaf.size).reshape(leaf.shape), params)
    rule = optim._rule(cfg, optim.make_schedule(cfg, 12))

    def moved(count):
        state = rule.init(params)
        updates, after = rule.update(grads, optim.at_step(state, jnp.int32(count)), params)
        again, _ = rule.update(grads, optim.at_step(after, jnp.int32(0)), params)
        assert all(not leaf.any() for leaf in jax.tree.leaves(again))  # the rate of step 0 is 0
        return updates

    first, second, last = moved(4), moved(8), moved(12)
    for a, b, c in zip(*map(jax.tree.leaves, (first, second, last)), strict=True):
        np.testing.assert_allclose(b, a / 2, rtol=1e-5)  # half-way down
        assert a.any()
        assert not c.any()


def test_sgd_is_that_of_torch():
    """Decay joins the gradient before the momentum, of scales and biases too; biases run faster."""
    rates = [0.1, 0.05, 0.05]
    rule = optim.make_sgd(
        optim.by_epoch(rates, 1),
        weight_decay=0.2,
        momentum=0.9,
        bias_factor=2.0,
        frozen=lambda name: name.startswith("still"),
    )
    rng = np.random.default_rng(0)
    names = ("fc.kernel", "fc.bias", "norm.scale", "still.kernel")
    params = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in names}
    wanted = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    moments = {name: np.zeros(3) for name in names}
    state = rule.transform.init(params)
    for step in range(4):
        grads = {name: rng.normal(size=3) for name in names}
        state = optim.at_step(state, jnp.int32(step))
        given = jax.tree.map(jnp.float32, grads)
        updates, state = rule.transform.update(given, state, params)
        params = optax.apply_updates(params, updates)
        for name in names[:3]:
            moments[name] = 0.9 * moments[name] + grads[name] + 0.2 * wanted[name]
            rate = rates[min(step, 2)] * (2 if name == "fc.bias" else 1)
            wanted[name] = wanted[name] - rate * moments[name]
    for name in names:
        np.testing.assert_allclose(params[name], wanted[name], rtol=1e-5, err_msg=name)


def test_a_given_schedule_takes_the_place_of_the_configs():
    params = {"fc.kernel": jnp.ones((2, 2))}
    rule = optim.make_optimizer(
        Optim(warmup_steps=5, weight_decay=0.0, clip_norm=0.0), 9, schedule=lambda step: 0.25
    )
    updates, _ = rule.transform.update(params, rule.transform.init(params), params)
    np.testing.assert_allclose(updates["fc.kernel"], -0.25, rtol=1e-4)
