# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py would measure, compiled ahead of time for a GPU that is not there.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
      python benchmarks/gpu_compiled.py [--parts "train 1b" ...] [--top 15] [--card h200]

Needs JAX's CUDA plugin and no GPU. A kernel's time is the longer of FLOPs / rate and bytes / rate,
by the accounting of ``m2jax plan``; the rates are what such a card was seen to reach, not those of
its datasheet. What that leaves out: launches, kernels that fill neither limit, and the products
inside cuDNN's attention, which the accounting does not see. So it tells which program moves less,
and not how fast either is. ``--top`` shows where the time of each case goes.
"""

import argparse
import dataclasses
import datetime
import time

import jax
from gpu_encode import encoder, inputs_of
from gpu_loss import DIM, PRODUCTS, blocks_of, program_of
from gpu_parts import LOSS, PARTS, STEP, named
from gpu_rows import what
from gpu_step import model_flops, model_of, prepared
from jax.sharding import SingleDeviceSharding

from m2jax.config import Mesh, UserError
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import describe, uncached
from m2jax.models import params as params_lib
from m2jax.plan import flops, hlo, hot, loops, traffic
from m2jax.plan.compile import OPTIONS
from m2jax.train.flops import traced

PRODUCT_RATE, COPY_RATE = 790e12, 4.3e12  # of an H200, as seen with PyTorch
KINDS = {STEP: "train", "gpu_encode:encodings": "encode", LOSS: "loss"}
HEAD = ("date", "what", "rows", "GiB held", "of it temporaries", "TFLOP done", "GB moved",
        "products ms", "modelled ms", "MFU of datasheet")  # fmt: skip


def lowered_of(kind: str, case: dict, machine) -> tuple:
    """(lowered program, rows, FLOPs that the work needs)."""
    if kind == "train":
        mesh = make_mesh(Mesh(), machine.devices)
        made = prepared(case, False, mesh, machine.chip.memory)
        if isinstance(made.lowered, Exception):
            raise made.lowered
        return made.lowered, made.experiment.data.batch_size, model_flops(made.experiment)
    place = SingleDeviceSharding(machine.devices[0])

    def there(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    if kind == "loss":
        pairs = there(jax.ShapeDtypeStruct((case["pairs"], DIM), "float32"))
        scale = there(jax.ShapeDtypeStruct((), "float32"))
        mesh = make_mesh(Mesh(), machine.devices)
        with blocks_of(case):
            lowered = program_of(case, case.get("tile", 1024), mesh=mesh).lower(pairs, pairs, scale)
        return lowered, case["pairs"], PRODUCTS * 2.0 * case["pairs"] ** 2 * DIM
    case = {"attention": "batch", "products": "", "param_dtype": "bfloat16", **case}
    cfg = model_of(case, False)
    inputs = jax.tree.map(there, inputs_of(cfg, case["modality"], case["batch"]))
    params = jax.tree.map(there, params_lib.abstract(cfg).params)
    encode = encoder(cfg, case["modality"])
    plain = encoder(
        model_of({**case, "attention": "batch", "products": ""}, False), case["modality"]
    )
    return encode.lower(params, *inputs), case["batch"], traced(plain.trace(params, *inputs).jaxpr)


def modelled(compiled, chip) -> tuple[dict, list[hot.Hot]]:
    """Figures of one program, and where they come from."""
    module = hlo.parse(compiled.as_text())
    visits = [visit for visit in loops.walk(module)]
    found = hot.hottest(module, visits, chip, {})
    moved = (
        traffic.moved(module, visit.computation, visit.instruction) * visit.times
        for visit in visits
        if not visit.inside
    )
    done, at_rate = flops.of_program(module, visits, chip)
    return {
        "done": done,
        "moved": sum(moved),
        "products": at_rate,
        "seconds": sum(one.seconds for one in found),
    }, found


def row(kind: str, case: dict, machine, chip, top: int) -> list[str]:
    """Lines of one case."""
    lowered, rows, needed = lowered_of(kind, case, machine)
    with uncached():
        compiled = lowered.compile(OPTIONS["cuda"])
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    figures, found = modelled(compiled, chip)
    share = needed / figures["seconds"] / machine.chip.peak_flops
    cells = (
        datetime.date.today(), what({"name": kind}, case), rows, f"{held / 2**30:.1f}",
        f"{memory.temp_size_in_bytes / 2**30:.2f}",
        f"{figures['done'] / 1e12:.1f}", f"{figures['moved'] / 1e9:.0f}",
        f"{1e3 * figures['products']:.1f}", f"{1e3 * figures['seconds']:.1f}",
        f"{100 * share:.1f} %",
    )  # fmt: skip
    lines = ["| " + " | ".join(str(cell) for cell in cells) + " |"]
    for one in found[:top]:
        lines.append(
            f"    {1e3 * one.seconds:8.2f} ms {one.flops / 1e12:7.1f} TFLOP"
            f" {one.bytes / 1e9:7.1f} GB {one.runs:5d} times  {one.origin}"
        )
    return lines


def main() -> None:
    """Compiles and prints, case by case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--top", type=int, default=0, help="kernels shown below each row")
    parser.add_argument("--card", default="h200", choices=("h100", "h200"))
    args = parser.parse_args()
    try:
        machine = describe(f"{args.card}:1")
    except UserError as error:
        raise SystemExit(str(error)) from None
    chip = dataclasses.replace(machine.chip, peak_flops=PRODUCT_RATE, memory_rate=COPY_RATE)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    for part in named(args.parts) if args.parts else PARTS:
        if part.work not in KINDS or part.flags:
            continue
        for case in part.cases:
            start = time.monotonic()
            try:
                lines = row(KINDS[part.work], case, machine, chip, args.top)
            except (UserError, jax.errors.JaxRuntimeError, hlo.HloError) as error:
                lines = [f"| {case} | {str(error).splitlines()[0]} |"]
            print(*lines, sep="\n", flush=True)
            if args.top:
                print(f"    compiled in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
