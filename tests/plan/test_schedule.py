# SPDX-License-Identifier: Apache-2.0
"""The schedule played back: what overlaps what, loops, and the roofline where nothing is told."""

import pytest

from m2jax.dist.topology import CHIPS, Topology
from m2jax.plan import hlo, hot, loops, schedule, traffic
from m2jax.plan.collectives import Collective

CHIP = CHIPS["v5p"]  # 1.75 GHz: 1.75e6 cycles are a millisecond

PROGRAM = """\
%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]) parameter(0)
  %x = f32[64] get-tuple-element(%s), index=1
  %ag = (f32[64], f32[512]) all-gather-start(%x), replica_groups={}, dimensions={0}
  %work = f32[64] fusion(%x), kind=kLoop, calls=%sine, backend_config={"estimated_cycles":"CYCLES"}
  %got = f32[512] all-gather-done(%ag)
  %j = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %up = s32[] add(%j, %one)
  ROOT %next = (s32[], f32[64]) tuple(%up, %work)
}

%sine (q: f32[64]) -> f32[64] {
  %q = f32[64] parameter(0)
  ROOT %sin = f32[64] sine(%q)
}

%more (c: (s32[], f32[64])) -> pred[] {
  %c = (s32[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(10)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64]) tuple(%zero, %p)
  %loop = (s32[], f32[64]) while(%start), condition=%more, body=%body
  %y = f32[64] get-tuple-element(%loop), index=1
  ROOT %sum = f32[64] all-reduce(%y), replica_groups={}, to_apply=%sine
}
"""


def collective(name: str, seconds: float, times: int) -> Collective:
    return Collective(
        name=name, kind="all-gather", axis="fsdp", group=8, times=times, sent=seconds, rate=1.0
    )


@pytest.mark.parametrize(
    ("work_ms", "gather_ms", "total_ms"),
    [
        (3, 2, 10 * 3 + 5),  # hidden behind compute
        (2, 3, 10 * 3 + 5),  # compute is hidden behind it
        (2, 0, 10 * 2 + 5),
    ],
)
def test_async_overlaps_and_sync_waits(work_ms: int, gather_ms: int, total_ms: int) -> None:
    module = hlo.parse(PROGRAM.replace("CYCLES", str(int(work_ms * 1.75e6))))
    found = {"ag": collective("ag", gather_ms / 1e3, 10), "sum": collective("sum", 5e-3, 1)}
    times = schedule.play(module, CHIP, found, at_peak=0.459e12 / CHIP.peak_flops)
    assert times.total == pytest.approx(total_ms / 1e3)
    assert times.compute == pytest.approx(10 * work_ms / 1e3)
    assert times.communication == pytest.approx((10 * gather_ms + 5) / 1e3)
    assert times.floor == pytest.approx(1e-3)
    assert times.unestimated < 1e-9  # the counter
    waits = schedule.waits(module, CHIP, found)
    assert waits["sum"] == pytest.approx(5e-3)
    assert waits.get("ag", 0.0) == pytest.approx(10 * max(gather_ms - work_ms, 0) / 1e3)


def test_the_longest_instructions_add_up_and_go_by_their_origin() -> None:
    """Loops count their trips, collectives none; a fusion goes by the product inside it."""
    text = PROGRAM.replace("CYCLES", "3500000").replace(
        "  ROOT %sin = f32[64] sine(%q)\n",
        "  %d = f32[] dot(%q, %q), lhs_contracting_dims={0}, rhs_contracting_dims={0}, "
        'metadata={op_name="jit(step)/transpose(jvp(while))/body/blocks/fc1/dot_general"}\n'
        "  ROOT %sin = f32[64] sine(%q)\n",
    )
    module = hlo.parse(text)
    found = {"ag": collective("ag", 2e-3, 10), "sum": collective("sum", 5e-3, 1)}
    first, *rest = hot.hottest(module, loops.walk(module), CHIP, found)
    assert (first.origin, first.runs) == ("backward blocks/fc1/dot_general", 10)
    assert first.seconds == pytest.approx(10 * 2e-3)
    assert first.flops == 10 * 2 * 64
    assert first.bytes == 10 * (256 + 256)
    best = 512 / CHIP.memory_rate
    assert first.bound(CHIP) == pytest.approx(best / 2e-3)
    compute = schedule.play(module, CHIP, found, 0.0).compute
    assert first.seconds + sum(one.seconds for one in rest) == pytest.approx(compute)


@pytest.mark.parametrize(("gather_ms", "total_ms"), [(1, 20 + 5), (3, 30 + 5)])
def test_a_product_fused_with_a_collective_is_computed_too(gather_ms: int, total_ms: int) -> None:
    """libtpu does that: taken for a collective alone, its product would cost nothing."""
    text = PROGRAM.replace("CYCLES", "3500000").replace(
        "  ROOT %sin = f32[64] sine(%q)\n",
        "  %d = f32[] dot(%q, %q), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n"
        "  %more = f32[512] all-gather(%q), replica_groups={}, dimensions={0}\n"
        "  ROOT %sin = f32[64] sine(%q)\n",
    )
    module = hlo.parse(text)
    found = {"ag": collective("ag", 0.0, 10), "sum": collective("sum", 5e-3, 1)}
    found["more"] = collective("more", gather_ms / 1e3, 10)
    times = schedule.play(module, CHIP, found, 0.0)
    assert times.total == pytest.approx(total_ms / 1e3)
    assert times.compute == pytest.approx(10 * 2e-3)
    first = hot.hottest(module, loops.walk(module), CHIP, found)[0]
    assert (first.runs, first.seconds) == (10, pytest.approx(10 * 2e-3))


def test_several_collectives_in_one_fusion_all_take_their_time() -> None:
    text = PROGRAM.replace("CYCLES", "0").replace(
        "  ROOT %sin = f32[64] sine(%q)\n",
        "  %m1 = f32[512] all-gather(%q), replica_groups={}, dimensions={0}\n"
        "  %m2 = f32[512] all-gather(%q), replica_groups={}, dimensions={0}\n"
        "  ROOT %sin = f32[64] sine(%q)\n",
    )
    found = {"ag": collective("ag", 0.0, 10), "sum": collective("sum", 0.0, 1)}
    found |= {"m1": collective("m1", 5e-3, 10), "m2": collective("m2", 7e-3, 10)}
    assert schedule.play(hlo.parse(text), CHIP, found, 0.0).total == pytest.approx(10 * 12e-3)
    waits = schedule.waits(hlo.parse(text), CHIP, found)  # each has its own share
    assert (waits["m1"], waits["m2"]) == (pytest.approx(50e-3), pytest.approx(70e-3))


def test_an_update_between_start_and_done_hides_nothing() -> None:
    text = PROGRAM.replace("CYCLES", "1750000").replace(
        "  %ag = (f32[64], f32[512]) all-gather-start(%x), replica_groups={}, dimensions={0}\n",
        "  %ag = ((f32[64]), f32[512], u32[]) async-start(%x), calls=%wrapped\n"
        "  %au = ((f32[64]), f32[512], u32[]) async-update(%ag)\n",
    ).replace("all-gather-done(%ag)", "async-done(%au)").replace(
        "%sine (q", "%wrapped (w: f32[64]) -> f32[512] {\n"
        "  %w = f32[64] parameter(0)\n"
        "  ROOT %g = f32[512] all-gather(%w), replica_groups={}, dimensions={0}\n}\n\n%sine (q",
    )  # fmt: skip
    found = {"g": collective("g", 3e-3, 10), "sum": collective("sum", 0.0, 1)}
    assert schedule.play(hlo.parse(text), CHIP, found, 0.0).total == pytest.approx(10 * 3e-3)
    assert schedule.waits(hlo.parse(text), CHIP, found) == {"g": pytest.approx(10 * 2e-3)}


def test_two_collectives_share_the_links() -> None:
    """Started together they end one after the other: never two at the full rate."""
    twice = PROGRAM.replace(
        "  %work = ",
        "  %ag2 = (f32[64], f32[512]) all-gather-start(%x), replica_groups={}\n  %work = ",
    ).replace("%next = ", "%next = ").replace(
        "  %got = f32[512] all-gather-done(%ag)\n",
        "  %got = f32[512] all-gather-done(%ag)\n  %got2 = f32[512] all-gather-done(%ag2)\n",
    )  # fmt: skip
    module = hlo.parse(twice.replace("CYCLES", "1750000"))
    found = {n: collective(n, s, 10) for n, s in (("ag", 2e-3), ("ag2", 3e-3), ("sum", 0.0))}
    times = schedule.play(module, CHIP, found, 0.0)
    assert times.total == pytest.approx(10 * 5e-3)
    waits = schedule.waits(module, CHIP, found)  # the second is behind the first
    assert (waits["ag"], waits["ag2"]) == (pytest.approx(10e-3), pytest.approx(30e-3))
    assert sum(waits.values()) == pytest.approx(times.total - times.compute)


def test_a_collective_that_the_next_loop_waits_for_is_told() -> None:
    """Links still busy with it when a loop begins that sends itself."""
    text = PROGRAM.replace("CYCLES", "1750000").replace(
        "  %loop = ",
        "  %ag0 = (f32[64], f32[512]) all-gather-start(%p), replica_groups={}\n  %loop = ",
    ).replace("  ROOT %sum", "  %got0 = f32[512] all-gather-done(%ag0)\n  ROOT %sum")  # fmt: skip
    found = {n: collective(n, s, r) for n, s, r in (("ag", 1e-3, 10), ("sum", 0.0, 1))}
    found["ag0"] = collective("ag0", 4e-3, 1)
    waits = schedule.waits(hlo.parse(text), CHIP, found)
    assert waits["ag0"] == pytest.approx(4e-3)
    assert waits.get("ag", 0.0) == pytest.approx(0.0)


@pytest.mark.parametrize("cycles", ["", '"estimated_cycles":"9223372036854775807"'])
def test_without_an_estimate_the_roofline_stands_in(cycles: str) -> None:
    text = PROGRAM.replace('"estimated_cycles":"CYCLES"', cycles)
    found = {"ag": collective("ag", 0.0, 10), "sum": collective("sum", 0.0, 1)}
    times = schedule.play(hlo.parse(text), CHIP, found, 0.0)
    counter = 3 * 4
    assert times.unestimated == pytest.approx(10 * (256 + 256 + counter) / CHIP.memory_rate)
    assert times.unestimated == times.compute


def test_a_slice_of_a_stack_moves_itself_alone() -> None:
    text = """\
%fused (stack: f32[100,64], i: s32[]) -> f32[64] {
  %stack = f32[100,64] parameter(0)
  %i = s32[] parameter(1)
  %cut = f32[1,64] dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64] reshape(%cut)
}

%write (old: f32[100,64], new: f32[1,64], j: s32[]) -> f32[100,64] {
  %old = f32[100,64] parameter(0)
  %new = f32[1,64] parameter(1)
  %j = s32[] parameter(2)
  ROOT %put = f32[100,64] dynamic-update-slice(%old, %new, %j, %j)
}

ENTRY %main (a: f32[100,64], k: s32[]) -> f32[100,64] {
  %a = f32[100,64] parameter(0)
  %k = s32[] parameter(1)
  %read = f32[64] fusion(%a, %k), kind=kLoop, calls=%fused
  %row = f32[1,64] bitcast(%read)
  ROOT %written = f32[100,64] fusion(%a, %row, %k), kind=kLoop, calls=%write
}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    moved = {n: traffic.moved(module, main, i) for n, i in main.instructions.items()}
    assert moved["read"] == 256 + 4 + 256
    assert moved["written"] == 256 + 4 + 256
    assert moved["row"] == 0


def test_a_slice_by_another_shape_moves_itself_alone() -> None:
    """XLA for GPUs shows a stack in another shape (a bitcast) before it reads or writes a slice."""
    text = """\
%cut (stack: f32[100,64], i: s32[]) -> f32[1,8,8] {
  %stack = f32[100,64] parameter(0)
  %seen = f32[100,8,8] bitcast(%stack)
  %i = s32[] parameter(1)
  ROOT %part = f32[1,8,8] dynamic-slice(%seen, %i, %i, %i), dynamic_slice_sizes={1,8,8}
}

%first (stack: f32[100,64]) -> f32[64] {
  %stack = f32[100,64] parameter(0)
  %one = f32[1,64] slice(%stack), slice={[0:1], [0:64]}
  ROOT %flat = f32[64] bitcast(%one)
}

%put (old: f32[100,64], new: f32[64], j: s32[]) -> f32[100,64] {
  %old = f32[100,64] parameter(0)
  %as = f32[100,8,8] bitcast(%old)
  %new = f32[64] parameter(1)
  %piece = f32[1,8,8] bitcast(%new)
  %j = s32[] parameter(2)
  %all = f32[100,8,8] dynamic-update-slice(%as, %piece, %j, %j, %j)
  ROOT %back = f32[100,64] bitcast(%all)
}

%add (stack: f32[100,64], other: f32[100,64]) -> f32[100,64] {
  %stack = f32[100,64] parameter(0)
  %other = f32[100,64] parameter(1)
  %seen = f32[100,64] bitcast(%stack)
  ROOT %sum = f32[100,64] add(%seen, %other)
}

ENTRY %main (a: f32[100,64], k: s32[]) -> f32[100,64] {
  %a = f32[100,64] parameter(0)
  %k = s32[] parameter(1)
  %read = f32[1,8,8] fusion(%a, %k), kind=kLoop, calls=%cut
  %head = f32[64] fusion(%a), kind=kLoop, calls=%first
  %whole = f32[100,64] fusion(%a, %a), kind=kLoop, calls=%add
  ROOT %written = f32[100,64] fusion(%whole, %head, %k), kind=kLoop, calls=%put
}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    moved = {n: traffic.moved(module, main, i) for n, i in main.instructions.items()}
    assert moved["read"] == 256 + 4 + 256
    assert moved["head"] == 256 + 256
    assert moved["written"] == 256 + 4 + 256
    assert moved["whole"] == 3 * 25_600


def test_machines_have_links_and_sources() -> None:
    for kind, chip in CHIPS.items():
        assert chip.kind == kind
        assert chip.source
        assert 1e14 < chip.peak_flops < 1e16
        assert chip.network_rate < chip.link_rate < chip.memory_rate
        if chip.clock and chip.clock_known:  # MXUs x 128 x 128 x 2 FLOPs in a cycle
            assert chip.peak_flops / chip.clock == pytest.approx(
                {"v4": 8, "v5e": 4, "v5p": 8}[kind] * 2 * 128**2, rel=0.01
            )
    assert Topology("x", CHIPS["v4"], (), 1).chip.platform == "tpu"
