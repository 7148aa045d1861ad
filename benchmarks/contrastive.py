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
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from m2jax.config import Mesh
from m2jax.dist.mesh import make_mesh
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import make_layout

DIM, MIB = 1024, 2**20
CHIPS = {
    "v5p:8": ("v5p:2x2x2", Mesh(data=2, fsdp=4)),
    "v5p:128": ("v5p:4x4x8", Mesh(data=8, fsdp=16)),
    "v5p:256": ("v5p:4x8x8", Mesh(data=16, fsdp=16)),
    "v5e:8": ("v5e:2x4", Mesh(data=2, fsdp=4)),
    "v5e:128": ("v5e:8x16", Mesh(data=8, fsdp=16)),
}
CLOCK_HZ = {"v5p": 1.75e9, "v5e": 1.5e9}  # assumed, as in the calibration of benchmarks/plan.md
GROUPED = {"v5p:8": 4, "v5e:8": 4, "v5p:128": 16, "v5e:128": 16, "v5p:256": 8}
IMPLS = ("dense", "local", "chunked", "ring", "grid", "grouped")
BATCHES = (2**15, 2**17, 2**19, 2**20)
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def mesh_of(chips):
    """The described chips as a mesh."""
    name, spec = CHIPS[chips]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return make_mesh(spec, devices)


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
    return function.lower(features, features, scale).compile()


def computations(text):
    """Lines of each computation of an HLO module; the entry is called ``ENTRY``."""
    found, current = {}, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault("ENTRY" if header[1] else header[2], [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def walk(found, name="ENTRY", times=1):
    """(line, how often it runs), loops multiplied by their bound (they start at 0, step by 1)."""
    for line in found[name]:
        yield line, times
        count = times
        if " while(" in line:
            condition = "\n".join(found[re.search(r"condition=%?([\w.\-]+)", line)[1]])
            bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
            if len(bounds) != 1 or "direction=LT" not in condition:
                raise SystemExit(f"a loop whose bound is not one constant: {line[:200]}")
            count = times * int(bounds[0])
        for called in re.findall(r"(?:body|calls)=%?([\w.\-]+)", line):
            yield from walk(found, called, count)


def array_bytes(kind):
    """Of every array in the text of a type, in order."""
    return [
        WIDTH[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", kind)
    ]


KINDS = "collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all"


def group_size(line):
    """Chips that take part in one instance of a collective; three ways of writing it."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    return math.prod(int(sizes[name.strip().strip("'")]) for name in axes[2].split(","))


def sent_bytes(line, inside_reduce_scatter):
    """Bytes one chip sends in a collective: the ring algorithm's counts."""
    match = re.search(rf" = (.*?) ({KINDS})(-start)?\((.*?)\)", line)
    if not match:
        return 0, ""
    kind, sizes = match[2], array_bytes(match[1])
    if kind == "collective-permute":
        return sizes[0], kind
    size = group_size(line)
    share = (size - 1) / size
    if kind == "all-gather":
        return max(sizes) * share, kind  # an asynchronous one's type names its operand too
    if kind == "reduce-scatter":
        return sum(sizes) * (size - 1), kind
    if kind == "all-reduce" and inside_reduce_scatter:
        return sum(sizes) * share, "reduce-scatter"
    return sum(sizes) * share * (2 if kind == "all-reduce" else 1), kind


def account(compiled, family):
    """(MiB sent per chip by kind, compiler's estimate of compute in ms) of one call."""
    found = computations(compiled.as_text())
    sent, cycles, reached = {}, 0, 0
    scatters = {
        name
        for lines in found.values()
        for line in lines
        for name in re.findall(r"calls=%?(all-reduce-scatter[\w.\-]*)", line)
    }
    inside = {line for name in scatters for line in found[name]}
    for line, times in walk(found):
        count, kind = sent_bytes(line, line in inside)
        reached += bool(kind)
        sent[kind] = sent.get(kind, 0) + times * count / MIB
        cycle = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles += times * int(cycle[1]) if cycle else 0
    sent.pop("", None)
    written = sum(bool(sent_bytes(x, False)[1]) for lines in found.values() for x in lines)
    if reached < written:
        raise SystemExit(f"{written - reached} collectives of the program were not reached")
    return sent, 1e3 * cycles / CLOCK_HZ[family]


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


def row(mesh, chips, impl, batch, *, group=None, tile=1024):
    """One line of a table, and its numbers."""
    family = chips.split(":")[0]
    start = time.perf_counter()
    try:
        compiled = program(mesh, impl, batch, group=group, tile=tile)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        if not used and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = f": {used[1]} of {used[2]}" if used else ""
        return f"| {chips} | {impl} | {batch} | {group or ''} | does not fit{sizes} | | | | |"
    seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes / MIB
    sent, compute = account(compiled, family)
    total, formula = sum(sent.values()), formula_mib(mesh, impl, batch, group)
    # Statistics and scalars travel too; a first hop that both passes make is made once.
    if formula is not None and not 0.95 * formula <= total <= 1.03 * formula + 20:
        print(f"  {total:.0f} MiB are not the formula's {formula:.0f}: {sent}", flush=True)
    return (
        f"| {chips} | {impl} | {batch} | {group or ''} | {temporary:.0f} | {total:.0f} | "
        f"{'' if formula is None else f'{formula:.0f}'} | {compute:.1f} | {seconds:.0f} |"
    )


HEADER = (
    "| chips | impl | batch | group | temporaries MiB | sent MiB | formula MiB | compute ms | "
    "compile s |\n|---|---|---|---|---|---|---|---|---|"
)


def table(args):
    """Every impl, batch and slice asked for."""
    print(HEADER)
    for chips in args.chips:
        mesh = mesh_of(chips)
        for impl in args.impl:
            for batch in args.batch:
                group = GROUPED[chips] if impl == "grouped" else None
                print(row(mesh, chips, impl, batch, group=group), flush=True)


def curve(args):
    """Memory against bytes of ``grid``, from the ring to everything held."""
    print(HEADER)
    mesh = mesh_of("v5p:128")
    for group in (1, 2, 4, 8, 16, 32):
        print(row(mesh, "v5p:128", "grid", 2**20, group=group), flush=True)


def tiles(args):
    """What the tile costs."""
    print(HEADER.replace("| group |", "| group, tile |"))
    mesh = mesh_of("v5p:128")
    for tile in (512, 1024, 2048):
        for group in (1, 8):
            line = row(mesh, "v5p:128", "grid", 2**20, group=group, tile=tile)
            print(line.replace(f"| {group} |", f"| {group}, {tile} |", 1), flush=True)


def pod(args):
    """The paper's setting: 256 chips, groups of one node of 8."""
    print(HEADER)
    mesh = mesh_of("v5p:256")
    for batch in (2**15, 2**16, 2**17):
        for impl in ("dense", "local", "grid", "grouped"):
            group = GROUPED["v5p:256"] if impl == "grouped" else None
            print(row(mesh, "v5p:256", impl, batch, group=group), flush=True)


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
