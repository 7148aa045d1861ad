# SPDX-License-Identifier: Apache-2.0
"""Machines by name: what they consist of, and which do not exist."""

import importlib.util
import math

import pytest

from m2jax.config import UserError
from m2jax.dist.topology import CHIPS, describe
from m2jax.launch.machine import CUBE, FLAT, TPUS, choose, parse

tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(
    ("name", "hosts", "host_chips", "slices"),
    [
        ("v5p:4x4x8", 32, 4, 1),
        ("2*v6e:16x16", 64, 4, 2),
        ("v6e:1x1", 1, 1, 1),
        ("v5e:2x4", 2, 4, 1),
        ("v5p:8x12x16", 384, 4, 1),
        ("h100:32x8", 32, 8, 1),
        ("h200:8", 1, 8, 1),
        ("gpu:3x2", 3, 2, 1),
    ],
)
def test_what_a_machine_consists_of(name, hosts, host_chips, slices) -> None:
    machine = parse(name)
    assert (machine.hosts, machine.host_chips, machine.slices) == (hosts, host_chips, slices)
    assert machine.all_hosts == hosts * slices
    assert parse(str(machine)) == machine


@pytest.mark.parametrize(
    "name",
    [
        "", "v5p", "v5p:", "v5p:4x4", "v6e:4x4x4", "v6e:8x4", "v6e:3x3", "v6e:32x32", "v5p:4x8x4",
        "v5p:4x4x6", "v5p:16x20x24", "0*v6e:4x4", "2*h100:8x8", "h100:1x2x3", "h100:0x8", "tpu:2x2",
        "v6e:4x4 ", "V6E:4x4",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_in_one_line(name) -> None:
    with pytest.raises(UserError, match=r"^--topology ") as caught:
        parse(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("topology", "nodes", "argument", "machine"),
    [
        ("", 0, "v5p-128", "v5p:4x4x8"),
        ("", 32, "v5p-128", "v5p:4x4x8"),
        ("v5p:4x8x8", 0, "v5p-128", "v5p:4x8x8"),  # what is said last counts
        ("", 0, "h100-256", "h100:32x8"),
        ("", 0, "h100-4", "h100:1x4"),
        ("", 3, "", "cpu:3"),
        ("", 0, "res=384", "cpu:1"),
        ("", 0, "large-2", "cpu:1"),
        ("2*v6e:16x16", 128, "", "2*v6e:16x16"),
    ],
)
def test_where_the_machine_comes_from(topology, nodes, argument, machine) -> None:
    assert str(choose(topology, nodes, argument)) == machine


@pytest.mark.parametrize(
    ("topology", "nodes", "argument", "said"),
    [
        ("", 2, "v5p-128", "has 32 hosts"),
        ("h100:4x8", 2, "", "has 4 hosts"),
        ("", -1, "", "at least 1"),
        ("", 0, "v5p-100", "no usual shape has 100 chips"),
        ("", 0, "h100-12", "no whole hosts of 8"),
    ],
)
def test_what_disagrees_is_refused(topology, nodes, argument, said) -> None:
    with pytest.raises(UserError, match=said):
        choose(topology, nodes, argument)


def test_usual_shapes_have_their_chips_and_every_type_can_be_planned_for() -> None:
    for shapes in (FLAT, CUBE):
        assert all(math.prod(map(int, s.split("x"))) == chips for chips, s in shapes.items())
    assert set(TPUS) == {kind for kind, chip in CHIPS.items() if chip.platform == "tpu"}


@tpu
@pytest.mark.parametrize("name", ["v4:2x2x4", "v5e:4x8", "v5p:4x4x8", "v6e:16x16", "2*v5p:2x2x2"])
def test_the_compiler_knows_the_same_machine(name) -> None:
    machine = parse(name)
    devices = describe(name).devices
    assert len(devices) == machine.all_hosts * machine.host_chips
    assert len({device.process_index for device in devices}) == machine.all_hosts
