# SPDX-License-Identifier: Apache-2.0
"""A tile of the contrastive loss in kernels of our own for NVIDIA GPUs (Pallas, through Triton).

Logits never reach the GPU's memory. ``sums`` makes a block of them, takes the sums of its rows and
of its columns, and writes these alone; what the blocks of a tile found is joined afterwards, so
the result does not depend on the order in which they ran. ``weights`` makes the block again (as
Dao et al. 2022 do for attention) and writes the weights of the logits in the type of the features,
once; two products of XLA's read them from there.

Those reads come from the L2 cache if the tile fits: 50 MB on an H100 or H200, and in bfloat16 the
weights of a tile of 1,024 rows by 4,096 columns take 8 MB, of 2,048 by 8,192 34 MB, of 4,096 by
16,384 134 MB, which does not fit. But smaller tiles pass over the held gradient more often, which
costs more than it saves as far as bytes tell (benchmarks/gpu.md).

Compiled ahead of time for an H200, never run on one; values are tested by Pallas's interpreter.
jax deprecates this backend of Pallas from 0.11 on, for the one called Mosaic GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh

from m2jax.config import UserError
from m2jax.losses.tiles import (
    PADDING,
    SOFTMAX,
    XLA,
    Form,
    Kernel,
    Rows,
    exp_sums,
    masked,
    softmax_weights,
)

INTERPRET = "interpret"  # the Pallas kernels by its interpreter, on any device: for tests
LEAST = 16  # rows, columns and depth of a block that Triton's product takes


class Blocks(NamedTuple):
    """What one program of a kernel computes, and how many threads and buffers it has for that."""

    rows: int
    columns: int
    depth: int  # features multiplied at a time
    warps: int
    stages: int  # pieces of that depth on their way from memory


# By bytes of a feature. Two bytes: 128 x 256 logits are 128 registers in each of 256 threads, the
# most that stays in registers, and the fewest bytes of features a product; four stages of 48 KB
# fill the shared memory. Four bytes: there are no tensor cores for whole float32.
BLOCKS = {2: Blocks(128, 256, 64, warps=8, stages=4), 4: Blocks(64, 64, 32, warps=4, stages=3)}


def _exp(x: jax.Array) -> jax.Array:
    """The card's own power of two; ``jnp.exp`` becomes eight instructions more.

    Relative to exp(x) it is off by about |x| 2^-24: most where a term is small beside its sum.
    """
    return jnp.exp2(math.log2(math.e) * x)


# Forms as kernels compute them, where that is another way.
QUICK = {
    SOFTMAX: SOFTMAX._replace(
        rows=functools.partial(exp_sums, axis=1, exp=_exp),
        columns=functools.partial(exp_sums, axis=0, exp=_exp),
        weights=functools.partial(softmax_weights, exp=_exp),
    )
}


def check(kernel: str, mesh: Mesh | None) -> None:
    """Refuses a kernel that the devices of a run cannot compute.

    Args:
        kernel: ``xla``, ``pallas``, or ``interpret``, which runs everywhere.
        mesh: the devices; not given: jax's default ones.

    Raises:
        UserError: ``pallas`` on devices that are no GPUs.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if kernel == "pallas" and platform not in ("gpu", "cuda"):
        raise UserError(
            f"loss.contrastive.kernel=pallas: needs NVIDIA GPUs, and this run has {platform} "
            "devices: use xla"
        )


@functools.cache
def make_kernel(name: str) -> Kernel:
    """``xla``, ``pallas`` or ``interpret`` as operations on a tile; one object per name.

    The Pallas ones take features of two or four bytes and add up in float32. Products of float32
    features are whole float32 ones, not TF32: slow, as no tensor core has them.
    """
    if name == "xla":
        return XLA
    interpret = name == INTERPRET
    return Kernel(
        functools.partial(_sums, interpret=interpret),
        functools.partial(_weights, interpret=interpret),
        typed=not interpret,  # the interpreter runs a kernel that was traced outside of the mesh
    )


def _sums(
    form: Form,
    rows: Rows,
    columns: Rows,
    scale: jax.Array,
    bias: jax.Array,
    *,
    padded: bool,
    interpret: bool,
) -> tuple[Any, Any]:
    call = _Call(rows, columns, padded)

    def kernel(rows: Rows, columns: Rows, numbers: Any, by_row: Any, by_column: Any) -> None:
        logits, quick = call.logits(rows, columns, numbers), QUICK.get(form, form)
        _write(by_row, quick.rows(logits))
        _write(by_column, quick.columns(logits))

    def shapes(rows: Rows, columns: Rows, numbers: jax.Array) -> tuple[Any, Any]:
        found = XLA.sums(form, rows, columns, numbers[0], numbers[1], padded=padded)
        return _repeated(found[0], call.grid[1]), _repeated(found[1], call.grid[0])

    m, n = len(rows.ids), len(columns.ids)
    by_row, by_column = call(
        "contrastive_sums", kernel, shapes, (call.per_row, call.per_column), interpret,
        call.fill(rows, call.blocks.rows), call.fill(columns, call.blocks.columns),
        jnp.stack([scale, bias]),
    )  # fmt: skip
    by_row, by_column = form.total(by_row), form.total(by_column)
    return jax.tree.map(lambda x: x[:m], by_row), jax.tree.map(lambda x: x[:n], by_column)


def _weights(
    form: Form,
    rows: Rows,
    columns: Rows,
    scale: jax.Array,
    bias: jax.Array,
    *,
    padded: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    call = _Call(rows, columns, padded)

    def kernel(rows: Rows, columns: Rows, numbers: Any, weights: Any, added: Any) -> None:
        states = jax.tree.map(lambda ref: ref[...], (rows.state, columns.state))
        found = QUICK.get(form, form).weights(call.logits(rows, columns, numbers), *states)
        added[...] = found.sum(1)
        weights[...] = found.astype(weights.dtype)

    def shapes(rows: Rows, columns: Rows, numbers: jax.Array) -> tuple[Any, Any]:
        found = XLA.weights(form, rows, columns, numbers[0], numbers[1], padded=padded)
        return found[0], _repeated(found[1], call.grid[1])

    blocks = call.blocks
    tile = pl.BlockSpec((blocks.rows, blocks.columns), lambda i, j: (i, j))
    weights, added = call(
        "contrastive_weights", kernel, shapes, (tile, call.per_row), interpret,
        call.fill(rows, blocks.rows), call.fill(columns, blocks.columns), jnp.stack([scale, bias]),
    )  # fmt: skip
    m, n = len(rows.ids), len(columns.ids)
    return weights[:m, :n], added.sum(0)[:m]


class _Call:
    """What both kernels share: the cut into blocks, and a block of logits."""

    def __init__(self, rows: Rows, columns: Rows, padded: bool) -> None:
        m, n, dim = len(rows.ids), len(columns.ids), rows.features.shape[1]
        most = BLOCKS[rows.features.dtype.itemsize]
        self.blocks = most._replace(
            rows=_fitting(m, most.rows),
            columns=_fitting(n, most.columns),
            depth=_fitting(dim, most.depth),
        )
        # The rows of the grid run first: the programs that are on the card at one time then share
        # few columns and, among them, all rows, and read both from the L2 cache.
        self.grid = (math.ceil(m / self.blocks.rows), math.ceil(n / self.blocks.columns))
        self.padded = padded or m % self.blocks.rows > 0 or n % self.blocks.columns > 0
        self.per_row = pl.BlockSpec((None, self.blocks.rows), lambda i, j: (j, i))
        self.per_column = pl.BlockSpec((None, self.blocks.columns), lambda i, j: (i, j))

    def fill(self, side: Rows, size: int) -> Rows:
        """Whole blocks: kernels know no edges. Added rows have the padding's id, and no state."""
        more = -len(side.ids) % size
        deeper = -side.features.shape[1] % self.blocks.depth
        return Rows(
            jnp.pad(side.features, ((0, more), (0, deeper))),
            jnp.pad(side.ids, (0, more), constant_values=PADDING),
            jax.tree.map(lambda x: jnp.pad(x, (0, more)), side.state),
        )

    def __call__(
        self, name: str, kernel: Any, shapes: Any, out: Any, interpret: bool,
        rows: Rows, columns: Rows, numbers: jax.Array,
    ) -> Any:  # fmt: skip
        """Runs a kernel over the grid.

        ``shapes`` makes, of the whole arrays, something shaped as the result. It is traced alone,
        which also tells over what axes of a mesh the result differs from device to device.
        """
        blocks, dim = self.blocks, rows.features.shape[1]
        by_row = functools.partial(pl.BlockSpec, index_map=lambda i, j: (i,))
        by_column = functools.partial(pl.BlockSpec, index_map=lambda i, j: (j,))

        def side(size: int, per: Any, whole: Any, state: Any) -> Rows:
            return Rows(whole, per((size,)), jax.tree.map(lambda _: per((size,)), state))

        made = jax.eval_shape(shapes, rows, columns, numbers)
        out = jax.tree.map(lambda spec, tree: jax.tree.map(lambda _: spec, tree), out, made)
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=(
                side(
                    blocks.rows,
                    by_row,
                    pl.BlockSpec((blocks.rows, dim), lambda i, j: (i, 0)),
                    rows.state,
                ),
                side(
                    blocks.columns,
                    by_column,
                    pl.BlockSpec((blocks.columns, dim), lambda i, j: (j, 0)),
                    columns.state,
                ),
                pl.BlockSpec((2,), lambda i, j: (0,)),
            ),
            out_specs=out,
            out_shape=made,
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            interpret=interpret,
            name=name,
        )(rows, columns, numbers)

    def logits(self, rows: Any, columns: Any, numbers: Any) -> jax.Array:
        """A block of logits, of references to its rows, its columns, and [scale, bias]."""
        blocks = self.blocks

        def deeper(step: jax.Array, so_far: jax.Array) -> jax.Array:
            part = pl.ds(step * blocks.depth, blocks.depth)
            return so_far + lax.dot_general(
                rows.features[:, part],
                columns.features[:, part],
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,  # float32 stays float32; 16 bits are exact anyway
                preferred_element_type=jnp.float32,
            )

        steps = rows.features.shape[1] // blocks.depth
        start = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
        found = numbers[0] * lax.fori_loop(0, steps, deeper, start) + numbers[1]
        return masked(found, rows.ids[...], columns.ids[...], padded=self.padded)


def _fitting(size: int, most: int) -> int:
    """A block's side: a power of two, no longer than it need be."""
    return max(LEAST, min(most, pl.next_power_of_2(size)))


def _repeated(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)


def _write(refs: Any, values: Any) -> None:
    def write(ref: Any, value: jax.Array) -> None:
        ref[...] = value

    jax.tree.map(write, refs, values)
