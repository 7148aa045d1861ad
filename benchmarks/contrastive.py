# SPDX-License-Identifier: Apache-2.0
"""Memory and traffic of the contrastive reductions, from programs compiled for TPUs without one.

    python benchmarks/contrastive.py table [--chips v5p:128 ...] [--batch 32768 ...] [--impl ...]
    python benchmarks/contrastive.py curve      # grid at 1M pairs on 128 v5p chips, by held devices
    python benchmarks/contrastive.py tiles      # ring and grid there, by tile size
    python benchmarks/contrastive.py pod        # dense, local and grouped on 256 chips
    python benchmarks/contrastive.py error      # of bfloat16 on the wire; on this machine's CPU

Needs the libtpu that the installed jax names (jax 0.10.2: 0.0.42.*), except for ``error``. Each
program is value and gradients (features, scale) of ``contrastive_loss``: float32 features in,
float32 gradients out, dimension 1024. Features travel in bfloat16 but for ``dense``, where the
compiler chooses. A row whose bytes are not those of ``formula_mib`` comes after what was counted.
"""

import argparse
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m2jax.config import Mesh
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import describe, uncached
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import make_layout
from m2jax.plan import collectives, hlo, loops, schedule
from m2jax.plan.compile import out_of_memory

DIM, MIB = 1024, 2**20
CHIPS = {
    "v5p:8": ("v5p:2x2x2", Mesh(data=2, fsdp=4)),
    "v5p:128": ("v5p:4x4x8", Mesh(data=8, fsdp=16)),
    "v5p:256": ("v5p:4x8x8", Mesh(data=16, fsdp=16)),
    "v5e:8": ("v5e:2x4", Mesh(data=2, fsdp=4)),
    "v5e:128": ("v5e:8x16", Mesh(data=8, fsdp=16)),
}
GROUPED = {"v5p:8": 4, "v5e:8": 4, "v5p:128": 16, "v5e:128": 16, "v5p:256": 8}
IMPLS = ("dense", "local", "chunked", "ring", "grid", "grouped")
BATCHES = (2**15, 2**17, 2**19, 2**20)


def machine_of(chips):
    """The described chips, and their mesh."""
    name, spec = CHIPS[chips]
    topology = describe(name)
    return topology, make_mesh(spec, topology.devices)


def program(mesh, impl, batch, *, group=None, tile=1024):
    """Value and gradients, compiled."""
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    wire = "" if impl == "dense" else "bfloat16"

    def loss(image, text, scale):
        return contrastive_loss(
            image, text, scale, impl=impl, mesh=mesh, group=group, wire_dtype=wire, tile=tile
        )

    features = jax.ShapeDtypeStruct((batch, DIM), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    function = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2)), out_shardings=(whole, (rows, rows, whole))
    )
    with uncached():
        return function.lower(features, features, scale).compile()


def account(compiled, topology, mesh):
    """(MiB sent per chip by kind, seconds of compute by the compiler's estimates) of one call."""
    module = hlo.parse(compiled.as_text())
    visits = list(loops.walk(module))
    machine = topology._replace(devices=tuple(mesh.devices.flat))
    found = collectives.collectives(visits, machine, dict(mesh.shape))
    missed = collectives.in_text(module) - set(found)
    if missed:
        raise SystemExit(f"collectives of the program that were not reached: {sorted(missed)}")
    sent = {}
    for one in found.values():
        sent[one.kind] = sent.get(one.kind, 0) + one.times * one.sent / MIB
    return sent, schedule.play(module, topology.chip, found, 0).compute


def formula_mib(mesh, impl, batch, group):
    """What must be sent per chip, from counting blocks; None where the compiler chooses."""
    if impl == "dense":
        return None
    layout = make_layout(mesh, impl, group)
    block = batch // layout.size(layout.rows) * DIM * 2 / MIB  # a chip's rows in bfloat16
    held, stops = layout.size(layout.held), math.prod(layout.size(r) for r in layout.rings)
    if impl == "local":  # both sides gathered; their gradients (bfloat16) scattered
        return 4 * block * (held - 1)
    # Rotated: forward, again backward, and a float32 gradient. Held: gathered once, and the same.
    return 4 * block * (stops - 1) + 3 * block * (held - 1)


def row(machine, chips, impl, batch, *, group=None, tile=1024):
    """One line of a table."""
    topology, mesh = machine
    start = time.perf_counter()
    try:
        compiled = program(mesh, impl, batch, group=group, tile=tile)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = out_of_memory(str(error))
        needs = f": {used / MIB:.0f}" if used else ""
        return f"| {chips} | {impl} | {batch} | {group or ''} | does not fit{needs} | | | | |"
    seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes / MIB
    sent, compute = account(compiled, topology, mesh)
    total, formula = sum(sent.values()), formula_mib(mesh, impl, batch, group)
    # Statistics and scalars travel too; a first hop that both passes make is made once.
    if formula is not None and not 0.95 * formula <= total <= 1.03 * formula + 20:
        print(f"  {total:.0f} MiB are not the formula's {formula:.0f}: {sent}", flush=True)
    return (
        f"| {chips} | {impl} | {batch} | {group or ''} | {temporary:.0f} | {total:.0f} | "
        f"{'' if formula is None else f'{formula:.0f}'} | {1e3 * compute:.1f} | {seconds:.0f} |"
    )


HEADER = (
    "| chips | impl | batch | group | temporaries MiB | sent MiB | formula MiB | compute ms | "
    "compile s |\n|---|---|---|---|---|---|---|---|---|"
)


def table(args):
    """Every impl, batch and slice asked for."""
    print(HEADER)
    for chips in args.chips:
        machine = machine_of(chips)
        for impl in args.impl:
            for batch in args.batch:
                group = GROUPED[chips] if impl == "grouped" else None
                print(row(machine, chips, impl, batch, group=group), flush=True)


def curve(args):
    """Memory against bytes of ``grid``, from the ring to everything held."""
    print(HEADER)
    machine = machine_of("v5p:128")
    for group in (1, 2, 4, 8, 16, 32):
        print(row(machine, "v5p:128", "grid", 2**20, group=group), flush=True)


def tiles(args):
    """What the tile costs."""
    print(HEADER.replace("| group |", "| group, tile |"))
    machine = machine_of("v5p:128")
    for tile in (512, 1024, 2048):
        for group in (1, 8):
            line = row(machine, "v5p:128", "grid", 2**20, group=group, tile=tile)
            print(line.replace(f"| {group} |", f"| {group}, {tile} |", 1), flush=True)


def pod(args):
    """The paper's setting: 256 chips, groups of one node of 8."""
    print(HEADER)
    machine = machine_of("v5p:256")
    for batch in (2**15, 2**16, 2**17):
        for impl in ("dense", "local", "grid", "grouped"):
            group = GROUPED["v5p:256"] if impl == "grouped" else None
            print(row(machine, "v5p:256", impl, batch, group=group), flush=True)


def error(args):
    """Value and gradients with bfloat16 features against float64 without rounding."""
    mesh = make_mesh(Mesh(data=2, fsdp=4))
    print("| features | scale | loss | error of value | of gradients | of the scale's |")
    print("|---|---|---|---|---|---|")
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp")))

    def value_and_grads(image, text, scale, **options):
        loss = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2))
        return jax.jit(lambda i, t, s: loss(i, t, s, **options))(image, text, scale)

    for kind, noise in (("random", None), ("close", 15.0), ("aligned", 0.0)):
        for scale in (14.3, 100.0):
            rng = np.random.default_rng(0)
            image, other = rng.normal(size=(2, args.rows, DIM))
            text = other if noise is None else image + noise * other
            image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
            narrow = [jax.device_put(x.astype(np.float32), rows) for x in (image, text)]
            found = value_and_grads(
                *narrow, scale, impl="grid", mesh=mesh, wire_dtype="bfloat16", tile=args.rows // 16
            )
            with jax.enable_x64(True):
                true = value_and_grads(jnp.asarray(image), jnp.asarray(text), scale)
            off = abs(float(found[0]) - float(true[0])) / max(1, abs(float(true[0])))
            worst = max(
                np.abs(a - b).max() / max(np.abs(b).max(), scale / args.rows)
                for a, b in zip(
                    map(np.asarray, found[1][:2]), map(np.asarray, true[1][:2]), strict=True
                )
            )
            of_scale = abs(float(found[1][2]) - float(true[1][2])) / max(1, abs(float(true[1][2])))
            print(
                f"| {kind} | {scale} | {float(true[0]):.4g} | {off:.1e} | {worst:.1e} | "
                f"{of_scale:.1e} |"
            )


def main():
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["table", "curve", "tiles", "pod", "error"])
    parser.add_argument("--chips", nargs="+", default=["v5p:8", "v5p:128"], choices=CHIPS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--impl", nargs="+", default=IMPLS, choices=IMPLS)
    parser.add_argument("--rows", type=int, default=4096, help="of error")
    args = parser.parse_args()
    if args.part == "error":
        jax.config.update("jax_num_cpu_devices", 8)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
    jax.config.update("jax_platforms", "cpu")
    globals()[args.part](args)


if __name__ == "__main__":
    main()
