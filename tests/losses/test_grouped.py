# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.config import Mesh, UserError
from m2jax.dist.mesh import make_mesh
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import check_beside_cudnn, make_layout
from tests.losses.reductions import assert_equal, dense, features, mesh_of, reduce


@pytest.mark.parametrize("options", [{}, {"sigmoid": True}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_the_mean_over_groups_of_their_dense_losses(group, options):
    with jax.enable_x64(True):
        image, text = features(group, 24, "close")
        found = reduce(8, image, text, 9.0, -2.0, impl="grouped", group=group, tile=2, **options)
        groups, rows = 8 // group, 3 * group
        parts = [
            dense(image[i : i + rows], text[i : i + rows], 9.0, -2.0, **options)
            for i in range(0, 24, rows)
        ]
        value = np.mean([part[0] for part in parts])
        grads = [np.concatenate([part[1][i] for part in parts]) / groups for i in (0, 1)]
        grads += [np.mean([part[1][i] for part in parts]) for i in (2, 3)]
        assert_equal(found, (value, tuple(grads)), 9.0, "float64")


def test_without_a_group_everything_is_one():
    with jax.enable_x64(True):
        image, text = features(1, 16)
        found = reduce(8, image, text, 50.0, impl="grouped")
        assert_equal(found, dense(image, text, 50.0), 50.0, "float64")


class Chip:
    """A device as far as a mesh looks at it."""

    platform = "gpu"
    device_kind = ""

    def __init__(self, index, per_host):
        self.id, self.process_index = index, index // per_host


def group_size(mesh, group):
    layout = make_layout(mesh, "grouped", group)
    return layout.size(layout.held)


def test_groups_are_whole_hosts_or_lie_inside_one():
    mesh = make_mesh(Mesh(data=4, fsdp=6), [Chip(i, per_host=4) for i in range(24)])
    for group in (1, 2, 12, 24):
        assert group_size(mesh, group) == group
    for group in (3, 6):
        with pytest.raises(UserError, match=f"group={group} cuts hosts in two"):
            make_layout(mesh, "grouped", group)


def test_on_a_tpu_hosts_do_not_matter_and_slices_are_the_outer_ring():
    chips = [Chip(i, per_host=4) for i in range(24)]
    mesh = make_mesh(Mesh(replica=2, data=2, fsdp=6), chips)
    layout = make_layout(mesh, "ring")
    assert layout.rings == (("replica",), ("data", "fsdp"))
    assert [layout.size(ring) for ring in layout.rings] == [2, 12]
    assert make_layout(mesh, "hierarchical").rings == (("replica",),)
    assert make_layout(mesh, "chunked").rings == ()
    for chip in chips:
        chip.platform = "tpu"
    assert group_size(mesh, 3) == 3


def test_a_layout_of_whole_axes_keeps_the_mesh_and_others_are_refused_beside_cudnn():
    mesh = make_mesh(Mesh(data=4, fsdp=6), [Chip(i, per_host=6) for i in range(24)])
    for impl, group in [("ring", None), ("chunked", None), ("local", None), ("grid", 6),
                        ("grid", 24), ("grouped", 6), ("dense", None)]:  # fmt: skip
        check_beside_cudnn(mesh, impl, group)
        if impl != "dense":
            assert make_layout(mesh, impl, group).mesh is mesh
    whole = make_layout(mesh, "grid", 6)
    assert (whole.rows, whole.held, whole.rings) == (("replica", "data", "fsdp"), ("fsdp",),
                                                     (("data",),))  # fmt: skip
    cut = make_layout(mesh, "grid", 12)
    assert cut.held == ("replica_held", "data_held", "fsdp_held")
    with pytest.raises(UserError, match=r"impl=grid: .*\(data 4 x fsdp 6\).*one of 1, 6, 24$"):
        check_beside_cudnn(mesh, "grid", 12)


def test_grid_holds_what_sends_least_and_stays_inside_a_slice():
    chips = [Chip(i, per_host=4) for i in range(128)]
    found = {
        spec: make_layout(make_mesh(spec, chips), "grid")
        for spec in (Mesh(data=8, fsdp=16), Mesh(replica=32, data=2, fsdp=2), Mesh(data=128))
    }
    assert [layout.size(layout.held) for layout in found.values()] == [8, 4, 8]
    assert [[layout.size(ring) for ring in layout.rings] for layout in found.values()] == [
        [16],
        [32],
        [16],
    ]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"impl": "grid", "group": 3}, UserError, "group=3 does not fit a mesh of replica 2 x"),
        ({"impl": "ring", "group": 2}, ValueError, "group=2 means nothing to impl='ring'"),
        ({"impl": "dense", "group": 2}, ValueError, "group=2 means nothing to impl='dense'"),
        ({"impl": "ring", "rows": 12}, UserError, "12 rows do not divide over 8 devices"),
        ({"impl": "grouped", "group": 2, "mesh": None}, UserError, "group=2 on one device"),
        ({"impl": "other"}, ValueError, "use one of dense, local, chunked, ring"),
        ({"bias": 0.0, "label_smoothing": 0.1}, ValueError, "goes with neither bias nor ids"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    image, text = map(jnp.asarray, features(0, kwargs.pop("rows", 16), dtype="float32"))
    with pytest.raises(error, match=match):
        contrastive_loss(image, text, 1.0, **{"mesh": mesh_of(8), **kwargs})
