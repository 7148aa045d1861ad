# SPDX-License-Identifier: Apache-2.0
"""The image-text contrastive loss (ITC), softmax (CLIP) or sigmoid (SigLIP).

``dense`` is the readable reference: one global matrix of logits. Under a mesh whose batch axes hold
the rows the compiler partitions it, so it is also the fast form for small batches. The other forms
never hold that matrix; ``benchmarks/contrastive.md`` says what each costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.dist.sharding import BATCH_AXES
from m2jax.losses import fused
from m2jax.losses.layout import IMPLS, TILED, make_layout
from m2jax.losses.local import gathered_sums
from m2jax.losses.ring import Pairs, pair_sums
from m2jax.losses.tiles import PADDING, SIGMOID, SOFTMAX, Sums, rounded


def contrastive_loss(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""] | float,
    *,
    bias: Float[Array, ""] | float | None = None,
    impl: str = "dense",
    mesh: Mesh | None = None,
    group: int | None = None,
    ids: Int[Array, " batch"] | None = None,
    label_smoothing: float = 0.0,
    wire_dtype: str = "",
    tile: int = 1024,
    kernel: str = "xla",
) -> Float[Array, ""]:
    """Mean of the image-to-text and text-to-image cross-entropies (Radford et al. 2021, figure 3).

    With ``bias`` it is the sigmoid loss (Zhai et al. 2023, equation 1): the sum over all pairs of
    -log sigmoid(z (scale cos + bias)), with z = 1 on the diagonal and -1 off it, over the batch.

    All but ``grouped`` compute the same number. Products run at jax's default matmul precision
    (bfloat16 passes on TPUs), sums in float32 or wider.

    Args:
        image: unit rows; row i belongs to row i of ``text``.
        text: unit rows.
        scale: multiplies the cosines (it is not a logarithm).
        bias: added to the scaled cosines; given, the loss is the sigmoid one.
        impl: ``dense`` one matrix of logits; ``local`` everything gathered, own rows of logits;
            ``chunked`` the same in tiles; ``ring`` least memory; ``grid`` least traffic for its
            memory; ``hierarchical`` gathers inside a slice and rotates between slices;
            ``grouped`` other rows of the group alone are negatives (He et al. 2024, M2-Encoder).
        mesh: where the rows lie over the axes of ``BATCH_AXES`` it has; ``None`` on one device.
        group: devices that gather among each other (``grid``) or share negatives (``grouped``; all
            if not given); see ``losses.layout``.
        ids: rows with equal ids (the same caption twice) are no negatives of each other.
        label_smoothing: share of the target spread evenly over all rows; softmax alone.
        wire_dtype: rounds the features, and sends and multiplies them in this type ("bfloat16");
            "" keeps their own. Gradients travel in float32 or wider and skip the rounding.
        tile: rows of logits in memory at a time, at most, by 4 columns each (block-wise forms).
        kernel: what computes a tile of the forms that have tiles (all but ``dense`` and ``local``):
            ``xla``, or ``pallas`` on NVIDIA GPUs, which keeps logits off the memory and has been
            compiled for them but never timed; ``interpret`` is ``pallas`` run slowly anywhere.

    Returns:
        The loss in float32, or in the inputs' precision where that is higher.

    Raises:
        ValueError: an unknown ``impl``, shapes that differ, options that exclude each other.
        UserError: a batch or group that does not fit the mesh; ``pallas`` without NVIDIA GPUs,
            without tiles or in float64.
    """
    _check(image, text, bias, impl, ids, label_smoothing, group, tile)
    wide = jnp.promote_types(image.dtype, jnp.float32)
    wire = jnp.dtype(wire_dtype or image.dtype)
    scale = jnp.asarray(scale, wide)
    _check_kernel(kernel, impl, mesh, wide, wire)
    if impl == "dense":
        if group is not None:
            raise ValueError(f"contrastive_loss: group={group} means nothing to impl='dense'")
        image, text = (_straight(x, wire).astype(wide) for x in (image, text))
        return _dense(image, text, scale, bias, mesh, ids, label_smoothing)
    layout = make_layout(mesh, impl, group)
    if len(image) % layout.size(layout.rows):
        raise UserError(
            f"contrastive_loss: {len(image)} rows do not divide over {layout.size(layout.rows)} "
            "devices: change the batch size or the mesh"
        )
    pairs = Pairs(
        layout, SOFTMAX if bias is None else SIGMOID, tile, wire, fused.make_kernel(kernel)
    )
    sums = gathered_sums if impl == "local" else pair_sums
    return _from_sums(sums, pairs, image, text, scale, bias, ids, label_smoothing)


def _from_sums(
    sums_of: Callable[..., Any],
    pairs: Pairs,
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: Any,
    ids: jax.Array | None,
    label_smoothing: float,
) -> jax.Array:
    """The loss from sums over the pairs off the diagonal, and the diagonal, which is each row's."""
    wide = scale.dtype
    shift = jnp.asarray(0 if bias is None else bias, wide)
    ids = jnp.arange(len(image)) if ids is None else ids
    if ids.dtype.itemsize > 4:  # too wide to travel: the place of an equal one among all stands in
        ids = jnp.searchsorted(jnp.sort(ids), ids)
    # Unsigned ones wrap. The two lowest of the 2^32 become one.
    ids = jnp.maximum(ids.astype(jnp.int32), PADDING + 1)
    rows, columns = sums_of(pairs, image, text, ids, scale, shift)
    image, text = (_straight(x, pairs.wire).astype(wide) for x in (image, text))
    own = scale * (image * text).sum(1) + shift
    if bias is not None:
        return jnp.mean(rows + jax.nn.softplus(-own))
    loss = 0.5 * jnp.mean(_cross_entropy_of(rows, own) + _cross_entropy_of(columns, own))
    if label_smoothing:
        groups = pairs.layout.size(pairs.layout.alone)
        loss += label_smoothing * (own.mean() - _mean_logit(image, text, scale, groups))
    return loss


def _check(
    image: Any, text: Any, bias: Any, impl: str, ids: Any, label_smoothing: float,
    group: int | None, tile: int,
) -> None:  # fmt: skip
    if impl != "dense" and impl not in IMPLS:
        raise ValueError(
            f"contrastive_loss: impl={impl!r} is unknown: use one of dense, {', '.join(IMPLS)}"
        )
    if image.shape != text.shape or image.dtype != text.dtype:
        raise ValueError(
            f"contrastive_loss: image {image.dtype}{list(image.shape)} and text "
            f"{text.dtype}{list(text.shape)} differ"
        )
    if tile < 1 or (group is not None and group < 1) or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"contrastive_loss: tile={tile}, group={group} or label_smoothing={label_smoothing} is "
            "out of range"
        )
    if label_smoothing and (bias is not None or ids is not None):
        raise ValueError("contrastive_loss: label_smoothing goes with neither bias nor ids")


def _check_kernel(kernel: str, impl: str, mesh: Mesh | None, wide: Any, wire: Any) -> None:
    if kernel == "xla":
        return
    if kernel not in ("pallas", fused.INTERPRET):
        raise ValueError(f"contrastive_loss: kernel={kernel!r} is unknown: use xla or pallas")
    fused.check(kernel, mesh)
    if impl not in TILED:
        raise UserError(
            f"contrastive_loss: kernel={kernel} means nothing to impl={impl}, which has no tiles: "
            f"use kernel=xla or one of {', '.join(TILED)}"
        )
    if wide == jnp.float64 or wire.itemsize not in fused.BLOCKS:
        raise UserError(
            f"contrastive_loss: kernel={kernel} adds up in float32 what it multiplies in 16 or 32 "
            f"bits, and features are {wire} in products: give it such, or use kernel=xla"
        )


def _straight(features: jax.Array, wire: Any) -> jax.Array:
    """Rounded features, through which gradients pass as if they were not."""
    narrow = rounded(features, wire)
    return features if narrow is features else features + lax.stop_gradient(narrow - features)


def _cross_entropy_of(sums: Sums, own: Float[Array, " n"]) -> Float[Array, " n"]:
    """log(1 + sum of exp(logit - own)): precise however small, unlike logsumexp - own."""
    some = sums.sum > 0
    gap = (lax.stop_gradient(sums.max) - own) + jnp.log(jnp.where(some, sums.sum, 1))
    return jax.nn.softplus(gap)


def _mean_logit(image: jax.Array, text: jax.Array, scale: jax.Array, groups: int) -> jax.Array:
    """Mean over groups of the mean of a group's logits, from the mean features."""
    image, text = (x.reshape(groups, -1, x.shape[1]).mean(1) for x in (image, text))
    return scale * (image * text).sum(1).mean()


def _dense(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: Any,
    mesh: Mesh | None,
    ids: jax.Array | None,
    label_smoothing: float,
) -> jax.Array:
    logits = scale * (image @ text.T)
    if mesh is not None:
        rows = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
        logits = lax.with_sharding_constraint(
            logits, NamedSharding(mesh, PartitionSpec(rows, None))
        )
    own = jnp.eye(len(logits), dtype=bool)
    if ids is not None:
        logits = jnp.where((ids[:, None] == ids[None, :]) & ~own, -jnp.inf, logits)
    if bias is not None:
        signed = jnp.where(own, 1, -1) * (logits + bias)
        return -jax.nn.log_sigmoid(signed).sum() / len(logits)
    both = _cross_entropy(logits, label_smoothing) + _cross_entropy(logits.T, label_smoothing)
    return 0.5 * both


def _cross_entropy(logits: Float[Array, "n n"], smoothing: float) -> Float[Array, ""]:
    """Mean over rows of logsumexp(row) - target . row, the target being the (smoothed) diagonal."""
    target = (1.0 - smoothing) * jnp.diagonal(logits)
    if smoothing:
        target = target + smoothing * logits.mean(axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - target)
