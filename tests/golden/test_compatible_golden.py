# SPDX-License-Identifier: Apache-2.0
"""AdvBCT and what it is compared with, against its authors' code: values, gradients, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.losses import adversarial, compatible, margins
from m2jax.models.batch_norm import Affine, Running
from m2jax.tasks.retrieval import advbct
from m2jax.tasks.retrieval.statistics import class_statistics
from tests.golden import fixtures

AREA = "downstream"


def is_class_meta(file):
    return {"feats", "labels", "centers", "radius_max", "theta_max"} <= fixtures.keys(file)


def is_limit(file):
    return {"feat", "eb_weight", "threshold", "radius_eb"} <= fixtures.keys(file)


def is_full_step(file):
    return {"x", "feat_old", "loss_total", "alpha"} <= fixtures.keys(file)


def is_baselines(file):
    return {"feat", "feat_old", "cos", "lce_boundary"} <= fixtures.keys(file)


def is_scene(file):
    return {"z", "W", "cam", "confusion", "grl_grad_z"} <= fixtures.keys(file)


def is_schedules(file):
    return {"adv_alpha", "adv_weight", "adv_E", "adv_nb"} <= fixtures.keys(file)


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5)


def old_classes(golden):
    centres, radii = (golden[key].astype(np.float32) for key in ("centers", "radius_max"))
    return compatible.OldClasses(centres, radii, golden["radius_count"] > 1)


@pytest.mark.parametrize("case", fixtures.cases(AREA, "class statistics", is_class_meta))
@pytest.mark.parametrize("size", [7, 10**6])
def test_class_statistics(case, size):
    golden = fixtures.arrays(case)
    feats, labels = golden["feats"], golden["labels"]

    def batches():
        for first in range(0, len(feats), size):
            yield feats[first : first + size], labels[first : first + size]

    found = class_statistics(batches, len(golden["centers"]))
    np.testing.assert_allclose(found.centres, golden["centers"], atol=1e-6)
    np.testing.assert_allclose(found.radius_max, golden["radius_max"], atol=1e-6)
    np.testing.assert_allclose(found.angle_max, golden["theta_max"], atol=2e-6)
    np.testing.assert_array_equal(found.counts, golden["radius_count"])
    for key in golden:
        for stem, values in (("radii_class", found.radii), ("thetas_class", found.angles)):
            if key.startswith(stem):
                want = golden[key]
                np.testing.assert_allclose(values[int(key.removeprefix(stem))], want, atol=2e-6)


@pytest.mark.parametrize("case", fixtures.cases(AREA, "boundary loss", is_limit))
def test_boundary(case):
    golden = fixtures.arrays(case)
    old, tau = old_classes(golden), float(golden["threshold"])

    def loss(features, weights):
        found = compatible.boundary(features, golden["labels"], weights, old, tau=tau)
        return found.loss, found

    (value, found), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        golden["feat"], golden["eb_weight"]
    )
    close(value, golden["loss"])
    assert found.violations == golden["n_active"]
    close(found.elastic, golden["radius_eb"])
    close(grads[0], golden["grad_feat"])
    close(grads[1], golden["grad_eb_weight"])


def tree_of(golden, kind):
    """Parameters, or gradients, of a fixture in our layout."""

    def get(name):
        return golden[f"{kind}__{name}"]

    def affine(name):
        return Affine(get(f"{name}.weight"), get(f"{name}.bias"))

    inner = "discriminator.d_"
    discriminator = advbct.Discriminator(
        get(f"{inner}fc1.weight").T,
        get(f"{inner}fc1.bias"),
        affine(f"{inner}bn1"),
        get(f"{inner}fc2.weight").T,
        get(f"{inner}fc2.bias"),
    )
    return advbct.Params(
        get("projection_dim.weight").T,
        affine("bn"),
        get("projection_cls.weight").T,
        discriminator,
        get("eboundary.weight"),
    )


def state_of(golden, kind):
    names = ("bn", "discriminator.d_bn1")
    return advbct.State(
        *(
            Running(golden[f"{kind}__{n}.running_mean"], golden[f"{kind}__{n}.running_var"])
            for n in names
        )
    )


@pytest.mark.parametrize("case", fixtures.cases(AREA, "AdvBCT step", is_full_step))
def test_full_step(case):
    golden = fixtures.arrays(case)
    radii, raw = golden["radius_max"], golden["radius_raw"][: len(golden["radius_max"])]
    # The fixture tells tau by the raw elastic radii |r - tau| of classes that are present.
    seen = raw > 0
    (tau,) = {
        round(float(t), 6)
        for t in (radii[seen] + raw[seen])
        if np.allclose(np.abs(radii[seen] - t), raw[seen], atol=1e-6)
    }
    epochs, epoch = int(golden["n_epoch"]), int(golden["epoch"])
    batch = advbct.Batch(golden["x"], golden["feat_old"], golden["labels"])

    def loss(params):
        return advbct.loss(
            params,
            state_of(golden, "param"),
            batch,
            old_classes(golden),
            progress=float(golden["p"]),
            adversarial_weight=adversarial.adversarial_weight(epoch, epochs),
            tau=tau,
        )

    close(adversarial.reversal_ramp(float(golden["p"])), golden["alpha"])
    params = jax.tree.map(jnp.asarray, tree_of(golden, "param"))
    (_, (terms, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wanted = {
        "loss_total": terms.total,
        "loss_ce": terms.classification,
        "loss_limit": terms.boundary,
        "loss_adv": terms.adversarial,
        "feature": terms.embedding,
        "cls_logits": terms.logits,
        "disc_new": terms.discriminated[0],
        "disc_old": terms.discriminated[1],
    }
    for key, value in wanted.items():
        close(value, golden[key])
    jax.tree.map(close, grads, tree_of(golden, "grad"))
    jax.tree.map(close, state, state_of(golden, "after"))


@pytest.mark.parametrize("case", fixtures.cases(AREA, "compatible baselines", is_baselines))
def test_baselines(case):
    golden = fixtures.arrays(case)
    features, old, labels = (golden[key] for key in ("feat", "feat_old", "targets"))
    for key in golden:
        name, found, hardest = key.partition("_topk")
        if not found or key.endswith("_grad"):
            continue

        def loss(x, name=name, hardest=hardest):
            return compatible.hot_refresh(
                x,
                old,
                labels,
                temperature=0.05,
                hardest=int(hardest),
                among_new=name == "hot_refresh",
            )

        value, grad = jax.value_and_grad(loss)(features)
        close(value, golden[key])
        close(grad, golden[f"{key}_grad"])
    for name, function in (("arcface", margins.arcface), ("cosface", margins.cosface)):
        found = function(golden["cos"], golden["margin_labels"], scale=30.0, margin=0.3)
        close(found, golden[f"{name}_s30_m0p3"])

    def both(x, kernel):
        eligible = golden["lce_theta"] > 0
        rows = kernel[golden["lce_labels"]]
        found = compatible.lce(x, golden["lce_center"], golden["lce_theta"], eligible, rows)
        return found.boundary + found.alignment, found

    (_, found), grads = jax.value_and_grad(both, (0, 1), has_aux=True)(features, golden["lce_proj"])
    close(found.boundary, golden["lce_boundary"])
    close(found.alignment, golden["lce_alignment"])
    close(grads[0], golden["lce_grad_feat"])
    close(grads[1], golden["lce_grad_proj"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "scene adversary", is_scene))
def test_scene_adversary(case):
    golden = fixtures.arrays(case)
    kernel, scenes = golden["W"].T, golden["cam"]

    def confusion(x):
        return adversarial.uniform_confusion(x @ kernel)

    def reversal(x):
        return adversarial.scene_adversary(
            x, kernel, scenes, form="reversal", weight=1.0, alpha=0.6
        )[0]

    close(adversarial.cross_entropy(golden["z"] @ kernel, scenes), golden["ce"])
    close(confusion(golden["z"]), golden["confusion"])
    close(jax.grad(confusion)(golden["z"]), golden["grad_confusion"])
    close(reversal(golden["z"]), golden["grl_loss"])
    close(jax.grad(reversal)(golden["z"]), golden["grl_grad_z"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "AdvBCT schedules", is_schedules))
def test_schedules(case):
    golden = fixtures.arrays(case)
    epochs, steps = int(golden["adv_E"]), int(golden["adv_nb"])
    for epoch in range(epochs):
        for place, step in enumerate((0, steps // 2, steps - 1)):
            progress = (step + epoch * steps) / (epochs * steps)
            found = adversarial.reversal_ramp(progress)
            np.testing.assert_allclose(found, golden["adv_alpha"][epoch, place], atol=1e-6)
        weight = adversarial.adversarial_weight(epoch, epochs)
        np.testing.assert_allclose(weight, golden["adv_weight"][epoch], atol=1e-9)
