# SPDX-License-Identifier: Apache-2.0
"""A plan as a table for people: one column per plan, so several can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from m2jax.plan.planner import Plan

GIB = 2**30
SHOWN = 10  # origins of compute

MODEL = """\
Modelled, not measured: the compiler's schedule played back. Compute takes libtpu's cycle estimates
(FLOPs / peak or bytes / memory rate, whichever is longer, where there are none). A collective runs
beside compute only between the start and the done that the compiler wrote, over both directions of
every torus dimension that its group spans (or all of NVLink, or the network). Left out: latency,
stragglers, contention for memory, host work, input. Every branch of a conditional is counted, the
longest is timed."""


def table(plans: Sequence[Plan], titles: Sequence[str]) -> str:
    """Rows of figures, a column per plan, and what the model assumes."""
    rows = [("", *titles)]
    for name, cells in _rows(plans):
        rows.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    chip = plans[0].topology.chip
    facts = (
        f"{chip.kind}: {chip.peak_flops / 1e12:.0f} TFLOP/s, {chip.memory / GIB:.1f} GiB at "
        f"{chip.memory_rate / 1e9:.0f} GB/s, {chip.link_rate / 1e9:.0f} GB/s per link "
        f"and direction, {chip.network_rate / 1e9:.1f} GB/s of network ({chip.source})"
    )
    notes = [facts, MODEL]
    if chip.platform == "cuda":
        notes.append(
            "On GPUs nothing estimates cycles: each kernel takes its roofline, which none reaches, "
            "so seconds compare programs. Products inside cuDNN's attention are not seen."
        )
    if chip.clock and not chip.clock_known:
        notes.append(
            f"The clock of {chip.kind} is assumed ({chip.clock / 1e9:.2f} GHz): its seconds "
            "compare programs, no more."
        )
    more = [*_hot(plans[0]), *_losses(plans[0])]
    return "\n".join([*(line.rstrip() for line in lines), *more, "", *notes])


def _hot(plan: Plan) -> list[str]:
    """The instructions that take longest, and how near to the roofline they run."""
    if not plan.hot or plan.times is None:
        return []
    lines = ["", "longest in compute, of the first column:", f"  {'share':>6} {'of roofline':>12}"]
    for hot in plan.hot[:SHOWN]:
        share, bound = hot.seconds / plan.times.compute, hot.bound(plan.topology.chip)
        lines.append(f"  {share:6.1%} {bound:12.0%}  {hot.origin}")
    rest = sum(hot.seconds for hot in plan.hot[SHOWN:]) / plan.times.compute
    lines.append(f"  {rest:6.1%} {'':12}  {max(len(plan.hot) - SHOWN, 0)} others")
    return lines


def _losses(plan: Plan) -> list[str]:
    """Each form of the contrastive loss, alone."""
    if not plan.contrastive:
        return []
    lines = ["", "one contrastive loss alone, forward and backward, MiB per chip:"]
    for cost in plan.contrastive:
        if cost.temporaries is None:
            lines.append(f"  {cost.impl:<13} {cost.note}")
            continue
        held, sent = cost.temporaries / 2**20, cost.sent / 2**20
        lines.append(f"  {cost.impl:<13} {held:10,.1f} temporaries {sent:10,.1f} sent")
    return lines


def _rows(plans: Sequence[Plan]) -> list[tuple[str, list[str]]]:
    rows = [
        ("fits", ["yes" if p.fits else "NO" for p in plans]),
        ("mesh", [_mesh(p) for p in plans]),
        ("global batch", [f"{p.batch_size:,}" for p in plans]),
        ("rows per chip", [f"{p.batch_size / p.chips:g}" for p in plans]),
        ("parameters GiB/chip", [_gib(p.memory.parameters) for p in plans]),
        ("optimiser GiB/chip", [_gib(p.memory.optimizer) for p in plans]),
        ("temporaries GiB/chip", [_gib(p.memory.temporaries) for p in plans]),
        ("total GiB/chip", [_gib(p.memory.total) for p in plans]),
        ("  peak by the compiler", [_gib(p.memory.peak) if p.times else "-" for p in plans]),
        ("limit GiB/chip", [_gib(p.topology.chip.memory) for p in plans]),
        ("model TFLOP/chip", [f"{p.model_flops / 1e12:,.1f}" for p in plans]),
        ("computed TFLOP/chip", [_or_dash(p, p.flops / 1e12, "{:,.1f}") for p in plans]),
        ("main memory GB/chip", [_or_dash(p, p.memory_bytes / 1e9, "{:,.1f}") for p in plans]),
        ("sent GiB/chip", [_or_dash(p, p.sent / GIB, "{:,.2f}") for p in plans]),
    ]
    keys = sorted({(c.kind, c.axis) for p in plans for c in p.collectives})
    for kind, axis in keys:
        cells = []
        for p in plans:
            sent = sum(c.sent * c.times for c in p.collectives if (c.kind, c.axis) == (kind, axis))
            cells.append(f"{sent / GIB:,.3f}" if sent else "-")
        rows.append((f"  {kind} over {axis}", cells))
    rows += [
        ("FLOPs per byte (chip's ridge)", [_intensity(p) for p in plans]),
        ("bound by", [p.bound for p in plans]),
        ("FLOPs / peak s", [_time(p, "floor") for p in plans]),
        ("compute s", [_time(p, "compute") for p in plans]),
        ("  without an estimate s", [_time(p, "unestimated") for p in plans]),
        ("communication s", [_time(p, "communication") for p in plans]),
        ("  not hidden s", [_or_dash(p, _waiting(p), "{:.3f}") for p in plans]),
        *(
            (f"    {kind} over {axis}, of", [_hidden(p, kind, axis) for p in plans])
            for kind, axis in keys
        ),
        ("step s (modelled)", [_time(p, "total") for p in plans]),
        ("MFU (modelled)", [_or_dash(p, 100 * p.mfu, "{:.1f} %") for p in plans]),
        ("MFU, compute only", [_or_dash(p, 100 * p.mfu_compute_only, "{:.1f} %") for p in plans]),
        ("check compiled/traced", [_check(p, "compiled_to_traced") for p in plans]),
        ("check traced/6N", [_check(p, "traced_to_sizes") for p in plans]),
        ("compile s", [f"{p.compile_seconds:.0f}" for p in plans]),
    ]
    return rows


def _intensity(plan: Plan) -> str:
    return _or_dash(plan, plan.intensity, "{:.0f}") + f" ({plan.topology.chip.ridge:.0f})"


def _waiting(plan: Plan) -> float:
    return plan.times.total - plan.times.compute if plan.times else 0.0


def _hidden(plan: Plan, kind: str, axis: str) -> str:
    """Seconds that nothing hides, of all that collectives of a kind over an axis take."""
    found = [one for one in plan.collectives if (one.kind, one.axis) == (kind, axis)]
    if not found:
        return "-"
    waited, whole = sum(c.waited for c in found), sum(c.seconds * c.times for c in found)
    return f"{waited:.3f} of {whole:.3f}"


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size > GIB else f"{size / GIB:.3g}"


def _or_dash(plan: Plan, value: float, form: str) -> str:
    return form.format(value) if plan.times else "-"


def _time(plan: Plan, name: str) -> str:
    return f"{getattr(plan.times, name):.3f}" if plan.times else "-"


def _check(plan: Plan, name: str) -> str:
    return f"{getattr(plan.checks, name):.3f}" if plan.checks else "-"
