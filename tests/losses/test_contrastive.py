# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from m2jax.config import Mesh
from m2jax.dist.mesh import make_mesh
from m2jax.losses.contrastive import contrastive_loss


def features(seed, n, dim):
    x = np.random.default_rng(seed).normal(size=(2, n, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(image, text, scale, smoothing=0.0):
    """The formula, written out in float64."""
    logits = scale * image @ text.T
    n = len(logits)
    target = np.full((n, n), smoothing / n) + (1 - smoothing) * np.eye(n)
    total = 0.0
    for z in (logits, logits.T):
        shifted = z - z.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        total -= (target * log_p).sum(1).mean()
    return total / 2


@given(
    n=st.sampled_from([1, 5, 12]),  # each is compiled anew
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 2**16),
    smoothing=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=15, deadline=None)
def test_equals_the_formula(n, scale, seed, smoothing):
    image, text = features(seed, n, 5)
    with jax.enable_x64(True):
        found = contrastive_loss(
            jnp.asarray(image), jnp.asarray(text), scale, label_smoothing=smoothing
        )
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(
            found, by_hand(image, text, scale, smoothing), rtol=1e-12, atol=1e-12
        )


def test_gradients_match_finite_differences():
    image, text = features(0, 6, 4)
    with jax.enable_x64(True):
        args = (jnp.asarray(image), jnp.asarray(text), jnp.asarray(14.0))
        loss = lambda *a: contrastive_loss(*map(jnp.asarray, a))  # noqa: E731
        check_grads(loss, args, order=1, modes=["rev"])


def test_rows_over_eight_devices_give_the_same_value_and_gradient():
    mesh = make_mesh(Mesh(data=2, fsdp=4))
    image, text = (jnp.asarray(x, jnp.float32) for x in features(1, 32, 8))
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp")))
    function = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2))
    alone = function(image, text, jnp.float32(50))
    sharded = jax.jit(
        lambda i, t, s: jax.value_and_grad(
            lambda *a: contrastive_loss(*a, mesh=mesh), argnums=(0, 1, 2)
        )(i, t, s)
    )(jax.device_put(image, rows), jax.device_put(text, rows), jnp.float32(50))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_features_are_contrasted_in_float32():
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in features(2, 8, 4))
    assert contrastive_loss(image, text, 100.0).dtype == jnp.float32


@pytest.mark.parametrize("kwargs", [{"impl": "other"}, {"text_rows": 3}])
def test_bad_arguments(kwargs):
    image, text = features(3, 4, 4)
    text = text[: kwargs.pop("text_rows", 4)]
    with pytest.raises(ValueError, match="contrastive_loss"):
        contrastive_loss(jnp.asarray(image), jnp.asarray(text), 1.0, **kwargs)
