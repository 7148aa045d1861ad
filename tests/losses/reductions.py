# SPDX-License-Identifier: Apache-2.0
"""Features, meshes and tolerances that the tests of the contrastive reductions share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m2jax.config import Mesh
from m2jax.dist.mesh import make_mesh
from m2jax.losses.contrastive import contrastive_loss

MESHES = {
    1: Mesh(),
    2: Mesh(replica=2),
    4: Mesh(data=2, fsdp=2),
    8: Mesh(replica=2, data=2, fsdp=2),
    "ring of 8": Mesh(data=8),
    "copies": Mesh(data=2, fsdp=2, model=2),
}
TOLERANCE = {"float64": (1e-12, 1e-12), "float32": (1e-6, 1e-5)}  # of the value, of gradients
DIM = 16


def features(seed, n, kind="random", dtype="float64", dim=DIM):
    """Unit rows: ``random``, ``aligned`` (a text is its image) or ``close`` (nearly)."""
    image, text = np.random.default_rng(seed).normal(size=(2, n, dim))
    text = {"random": text, "aligned": image, "close": image + 0.5 * text}[kind]
    return tuple(
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype) for x in (image, text)
    )


def mesh_of(name):
    """One of ``MESHES`` on as many virtual devices as it names."""
    spec = MESHES[name]
    count = max(spec.replica * max(spec.data, 1) * spec.fsdp * spec.model, 1)
    return make_mesh(spec, jax.devices()[:count])


@functools.cache
def compiled(mesh_name, options):
    """Value and gradients (image, text, scale, bias) as a jitted function; options as items."""
    mesh, kwargs = mesh_of(mesh_name), dict(options)
    sigmoid = kwargs.pop("sigmoid", False)

    def loss(image, text, scale, bias, ids):
        more = {"bias": bias} if sigmoid else {}
        if ids is not None:
            more["ids"] = ids
        return contrastive_loss(image, text, scale, mesh=mesh, **more, **kwargs)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))), mesh


def reduce(mesh_name, image, text, scale, bias=0.0, ids=None, **options):
    """Value and gradients over a mesh, rows lying where a trainer puts them."""
    function, mesh = compiled(mesh_name, tuple(sorted(options.items())))
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp")))
    put = functools.partial(jax.device_put, device=rows)
    number = functools.partial(jnp.asarray, dtype=image.dtype)
    ids = None if ids is None else put(ids)
    return function(put(image), put(text), number(scale), number(bias), ids)


@functools.cache
def _reference(options):
    kwargs = dict(options)
    sigmoid = kwargs.pop("sigmoid", False)

    def loss(image, text, scale, bias, ids):
        more = {"bias": bias} if sigmoid else {}
        return contrastive_loss(image, text, scale, ids=ids, **more, **kwargs)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def dense(image, text, scale, bias=0.0, ids=None, **options):
    """What every exact form must equal: the readable one on one device, in float64."""
    image, text = (jnp.asarray(x, jnp.float64) for x in (image, text))
    args = (image, text, jnp.asarray(scale, jnp.float64), jnp.asarray(bias, jnp.float64), ids)
    return _reference(tuple(sorted(options.items())))(*args)


def errors(found, expected, scale):
    """Of the value and the worst of the gradients, relative as the issue of the losses defines."""
    (value, grads), (true, true_grads) = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), pair) for pair in (found, expected)
    )
    of_value = abs(value - true) / max(1, abs(true))
    of_grads = []
    for grad, right in zip(grads, true_grads, strict=True):
        least = scale / len(right) if right.ndim else 1
        of_grads.append(np.abs(grad - right).max() / max(np.abs(right).max(), least))
    assert np.isfinite(of_value)
    assert np.isfinite(of_grads).all()
    return of_value, max(of_grads)


def assert_equal(found, expected, scale, dtype):
    """Within the tolerance of the type."""
    of_value, of_grads = errors(found, expected, scale)
    most_value, most_grads = TOLERANCE[dtype]
    assert of_value <= most_value, f"value off by {of_value:.1e}"
    assert of_grads <= most_grads, f"gradient off by {of_grads:.1e}"
