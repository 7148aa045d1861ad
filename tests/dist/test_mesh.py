# SPDX-License-Identifier: Apache-2.0
"""Mesh sizes, refusals, and which axis crosses between slices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from m2jax import config
from m2jax.config import UserError
from m2jax.dist.mesh import AXES, arrange, local_mesh, make_mesh, mesh_shape
from m2jax.dist.sharding import BATCH_AXES


def test_every_axis_can_be_configured() -> None:
    assert set(AXES) <= {field.name for field in dataclasses.fields(config.Mesh)}
    assert set(BATCH_AXES) < set(AXES)


def test_mesh_over_the_virtual_devices() -> None:
    mesh = make_mesh(config.Mesh(fsdp=2, model=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "model": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_over_some_devices() -> None:
    assert make_mesh(config.Mesh(), jax.devices()[:3]).shape["data"] == 3


def test_devices_of_this_process() -> None:
    assert dict(local_mesh(2).shape) == {"replica": 1, "data": 4, "fsdp": 2, "model": 1}
    for split in (3, 16):
        with pytest.raises(UserError, match=f"over {split} devices: this process has 8: use"):
            local_mesh(split)


sizes = st.integers(1, 6)


@given(st.tuples(sizes, sizes, sizes, sizes), st.sampled_from(AXES))
def test_minus_one_is_what_is_left(shape: tuple[int, int, int, int], free: str) -> None:
    spec = config.Mesh(**dict(zip(AXES, shape, strict=True)))
    devices = math.prod(shape)
    assert mesh_shape(spec, devices) == shape
    assert mesh_shape(dataclasses.replace(spec, **{free: -1}), devices) == shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (config.Mesh(data=3), "take 3 devices but there are 8"),
        (config.Mesh(data=2), "take 2 devices but there are 8"),
        (config.Mesh(fsdp=3), "take 3 x n devices but there are 8"),
        (config.Mesh(fsdp=16), "take 16 x n devices but there are 8"),
        (config.Mesh(fsdp=-1), "one of them may be -1"),
        (config.Mesh(model=0), "at least 1"),
        (config.Mesh(model=-2), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(spec: config.Mesh, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mesh_shape(spec, 8)
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as the layout looks at."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """Two by two by two chips in each of two slices, numbered alternately."""
        inside = self.id // 2
        return (inside & 1, inside >> 1 & 1, inside >> 2)


def test_only_replica_crosses_between_slices() -> None:
    chips = [Chip(id=i, slice_index=i % 2) for i in range(16)]  # slices interleaved on purpose
    grid = arrange((4, 1, 2, 2), chips)
    assert grid.shape == (4, 1, 2, 2)
    assert {chip.id for chip in grid.flat} == set(range(16))
    for replica in grid:
        assert len({chip.slice_index for chip in replica.flat}) == 1
    with pytest.raises(UserError, match="make it a multiple of 2"):
        arrange((1, 4, 2, 2), chips)


def test_gpus_stay_in_order_of_hosts() -> None:
    gpus = [Chip(id=i, slice_index=i // 4, platform="gpu") for i in range(8)]
    grid = arrange((1, 2, 4, 1), gpus)
    np.testing.assert_array_equal(
        [[g.id for g in row] for row in grid[0, :, :, 0]], [[0, 1, 2, 3], [4, 5, 6, 7]]
    )
