# SPDX-License-Identifier: Apache-2.0
"""The batch-hard triplet over all chips: memory and bytes against the dense loss.

    python benchmarks/triplet.py [--chips v5p:8] [--batches 4096 16384]

Value and gradient are compiled by the TPU compiler for chips that need not be there. ``ring`` is
``batch_hard`` with a mesh; ``dense`` is the same function without one, which the compiler lays out
over the chips as it likes. Temporaries and bytes sent are of one chip. The formula counts what must
travel round: blocks of float32 rows forward, of gradients backward, 2 (n - 1) of each chip's rows.
"""

import argparse

import jax
import jax.numpy as jnp
from contrastive import account, machine_of
from jax.sharding import NamedSharding, PartitionSpec

from m2jax.dist.topology import uncached
from m2jax.losses.triplet import batch_hard
from m2jax.plan.compile import out_of_memory

MIB = 2**20
DIM = 768
HEADER = (
    "| chips | form | batch | temporaries MiB | sent MiB | formula MiB |\n|---|---|---|---|---|---|"
)


def program(mesh, form, batch):
    """Value and gradient, compiled."""
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def loss(features, labels):
        return batch_hard(features, labels, mesh=mesh if form == "ring" else None).loss

    shapes = (
        jax.ShapeDtypeStruct((batch, DIM), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows),
    )
    function = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, rows))
    with uncached():
        return function.lower(*shapes).compile()


def row(chips, form, batch):
    """One line of the table."""
    topology, mesh = machine_of(chips)
    try:
        compiled = program(mesh, form, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = out_of_memory(str(error)) or 0
        return f"| {chips} | {form} | {batch} | does not fit: {used / MIB:.0f} | | |"
    temporary = compiled.memory_analysis().temp_size_in_bytes / MIB
    sent, _ = account(compiled, topology, mesh)
    formula = 2 * (mesh.size - 1) * batch / mesh.size * DIM * 4 / MIB if form == "ring" else None
    shown = "" if formula is None else f"{formula:.0f}"
    total = sum(sent.values())
    return f"| {chips} | {form} | {batch} | {temporary:.0f} | {total:.0f} | {shown} |"


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5p:8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4096, 16384])
    args = parser.parse_args()
    print(HEADER)
    for chips in args.chips:
        for batch in args.batches:
            for form in ("dense", "ring"):
                print(row(chips, form, batch), flush=True)


if __name__ == "__main__":
    main()
