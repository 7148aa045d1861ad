# SPDX-License-Identifier: Apache-2.0
"""Collectives of real programs over eight virtual devices, and every notation of groups."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m2jax import config
from m2jax.dist.mesh import AXES, make_mesh
from m2jax.dist.topology import CHIPS, Topology
from m2jax.plan import collectives as lib
from m2jax.plan import hlo, loops

SIZES = {"replica": 1, "data": 2, "fsdp": 4, "model": 1}


def mesh() -> jax.sharding.Mesh:
    return make_mesh(config.Mesh(data=2, fsdp=4))


def machine() -> Topology:
    return Topology("toy", CHIPS["h100"], tuple(mesh().devices.flat), 1)


def compiled(function, axes, shape=(64, 32), *, out=None):
    """HLO of a shard_map over the mesh."""
    spec = PartitionSpec(axes)
    mapped = jax.shard_map(
        function, mesh=mesh(), in_specs=spec, out_specs=spec if out is None else out,
        check_vma=False,
    )  # fmt: skip
    place = NamedSharding(mesh(), spec)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


def found(module: hlo.Module) -> list[lib.Collective]:
    result = lib.collectives(loops.walk(module), machine(), SIZES)
    assert set(result) == lib.in_text(module)
    return list(result.values())


WHOLE = PartitionSpec()
BATCH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("function", "kind", "axis", "group", "sent"),
    [
        # 64 x 32 floats over 8 devices: a shard is 1,024 bytes
        (lambda x: jax.lax.all_gather(x, "fsdp"), "all-gather", "fsdp", 4, 4096 * 3 / 4),
        (lambda x: jax.lax.all_gather(x, BATCH), "all-gather", "data+fsdp", 8, 8192 * 7 / 8),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", "data", 2, 2 * 1024 * 1 / 2),
        (lambda x: jax.lax.psum(x, BATCH), "all-reduce", "data+fsdp", 8, 2 * 1024 * 7 / 8),
        (
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
            "reduce-scatter", "fsdp", 4, 1024 * 3 / 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute", "fsdp", 2, 1024,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
            "all-to-all", "fsdp", 4, 1024 * 3 / 4,
        ),
    ],
)  # fmt: skip
def test_kind_axis_and_bytes(function, kind, axis, group, sent) -> None:
    (one,) = found(compiled(function, BATCH, out=WHOLE))
    assert (one.kind, one.axis, one.group, one.times) == (kind, axis, group, 1)
    assert one.sent == pytest.approx(sent)


def test_a_loop_counts_every_iteration() -> None:
    def rotate(x: jax.Array) -> jax.Array:
        step = lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=11)[0]

    (one,) = found(compiled(rotate, BATCH))
    assert (one.kind, one.axis, one.times) == ("all-reduce", "fsdp", 11)


NOTATIONS = [
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
    "replica_groups=[4,2]<=[2,4]T(1,0)",
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}",
]


def instruction(attributes: str) -> hlo.Instruction:
    text = f"ENTRY %m (p: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4] all-reduce(%p), {attributes}\n}}"
    return hlo.parse(text).computations["m"].root


@pytest.mark.parametrize("notation", NOTATIONS)
def test_notations_of_the_same_groups(notation: str) -> None:
    one = instruction(f"channel_id=3, {notation}, use_global_device_ids=true, to_apply=%add")
    groups = {frozenset(group) for group in lib.groups_of(one, 8)}
    assert groups == {frozenset(pair) for pair in ((0, 4), (1, 5), (2, 6), (3, 7))}


def test_no_groups_mean_everyone_and_unknown_ones_are_refused() -> None:
    assert lib.groups_of(instruction("replica_groups={}, to_apply=%add"), 4) == ((0, 1, 2, 3),)
    everyone = lib.groups_of(instruction("replica_groups={{0,1,2,3}}, to_apply=%add"), 4)
    assert everyone == ((0, 1, 2, 3),)
    for text in ("replica_groups=@later", "replica_groups=mesh['a'=8] {'a':(2)4}"):
        with pytest.raises(hlo.HloError, match="unknown notation"):
            lib.groups_of(instruction(text), 8)


def test_a_collective_that_no_call_reaches_is_noticed() -> None:
    """The reader's self-check: drop one call, and the text still names the collective."""
    step = lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None)  # noqa: E731
    module = compiled(lambda x: jax.lax.scan(step, x, None, length=3)[0], BATCH)
    whiles = [
        (c, i)
        for c in module.computations.values()
        for i in c.instructions.values()
        if i.opcode == "while"
    ]
    for computation, loop in whiles:
        del computation.instructions[loop.name]
    reached = lib.collectives(loops.walk(module), machine(), SIZES)
    assert lib.in_text(module) - set(reached)


class Chip:
    """A described device: where it stands."""

    def __init__(self, number: int, slices: int = 1):
        self.coords = (number % 4, number // 4 % 4, 0)
        self.slice_index = number * slices // 16


@pytest.mark.parametrize(
    ("group", "slices", "rate"),
    [
        ((0, 1, 2, 3), 1, 200e9),  # a row: one dimension, both directions
        ((0, 1), 1, 100e9),  # half a row: a line
        ((0, 1, 4, 5), 1, 200e9),  # a square of lines
        (tuple(range(16)), 1, 400e9),  # a plane
        ((0, 8), 2, 6.25e9),  # over the network
    ],
)
def test_rates_follow_the_links_a_group_spans(group, slices, rate) -> None:
    devices = tuple(Chip(i, slices) for i in range(16))
    topology = Topology("toy", CHIPS["v5p"], devices, slices)
    places = lib._Places(topology, dict(zip(AXES, (1, 1, 16, 1), strict=True)))
    assert places.rate((group,), "all-gather") == rate
    assert places.rate((group[:2],), "collective-permute") == (100e9 if slices == 1 else rate)


def test_rows_of_a_flat_machine_close_in_a_whole_pod_alone() -> None:
    devices = tuple(Chip(i) for i in range(16))
    places = lib._Places(
        Topology("toy", CHIPS["v5e"], devices, 1), dict(zip(AXES, (1, 1, 16, 1), strict=True))
    )
    assert places.rate(((0, 1, 2, 3),), "all-gather") == 50e9


def test_every_kind_is_spelt_as_hlo_does() -> None:
    assert all(re.fullmatch(r"[a-z-]+", kind) for kind in lib.KINDS)


@pytest.mark.parametrize(
    ("line", "computation", "kind", "sent"),
    [
        # (operands, results): the results are what is gathered
        ("(f32[4], bf16[8], f32[16], bf16[32]) all-gather-start(%p, %q)", "main", "all-gather",
         (16 * 4 + 32 * 2) * 3 / 4),
        ("f32[16] all-reduce-start(%p)", "main", "all-reduce", 2 * 64 * 3 / 4),
        ("(f32[16], f32[16], u32[], u32[]) collective-permute-start(%p)", "main",
         "collective-permute", 64),
        ("f32[4] reduce-scatter(%p)", "main", "reduce-scatter", 64 * 3 / 4),
        # how GPUs write it: operands come first here too
        ("((f32[16], bf16[32]), (f32[4], bf16[8])) reduce-scatter-start(%p, %q)", "main",
         "reduce-scatter", (16 * 4 + 32 * 2) * 3 / 4),
        # how libtpu writes a fused reduce-scatter: the whole goes in
        ("f32[16] all-reduce(%p)", "all-reduce-scatter.3", "reduce-scatter", 64 * 3 / 4),
    ],
)  # fmt: skip
def test_forms_that_compilers_write(line, computation, kind, sent) -> None:
    groups = "source_target_pairs={{0,1},{1,0}}" if "permute" in line else "replica_groups={}"
    text = f"ENTRY %{computation} (p: f32[16]) -> f32[4] {{\n  ROOT %r = {line}, {groups}\n}}"
    module = hlo.parse(text)
    machine_of_four = machine()._replace(devices=machine().devices[:4])
    found = lib.collectives(loops.walk(module), machine_of_four, {**SIZES, "data": 1})
    (one,) = found.values()
    assert (one.kind, one.sent) == (kind, sent)
