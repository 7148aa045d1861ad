# SPDX-License-Identifier: Apache-2.0
"""DC-Former's losses, the batch-hard triplet and the samplers against the authors' code."""

import jax
import numpy as np
import pytest

from m2jax.losses.compatible import unit
from m2jax.losses.diversity import dcformer_loss, self_diverse
from m2jax.losses.triplet import batch_hard
from m2jax.optim import by_epoch, transreid_rates
from m2jax.tasks.reid import samplers
from tests.golden import fixtures

AREA = "downstream"


def is_diverse(file):
    return any(key.endswith("_sdc_grad") for key in fixtures.keys(file))


def is_triplet(file):
    return {"feat", "labels", "soft_loss", "soft_ap"} <= fixtures.keys(file)


def is_total(file):
    return {"feat", "score", "labels", "sdc_total"} <= fixtures.keys(file)


def is_samplers(file):
    return {"counts", "hard_weight", "hard_anchor", "hard_pid_seq"} <= fixtures.keys(file)


def is_rates(file):
    return {"base_lr", "epochs", "lr"} <= fixtures.keys(file)


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", fixtures.cases(AREA, "diversity losses", is_diverse))
def test_diversity(case):
    golden = fixtures.arrays(case)
    for key in golden:
        stem, _, name = key.rpartition("_")
        if name not in ("sdc", "dwc"):
            continue

        def loss(x, name=name):
            return self_diverse(x, dynamic=name == "dwc")

        value, grad = jax.value_and_grad(loss)(golden[f"{stem}_feat"])
        close(value, golden[key])
        close(grad, golden[f"{key}_grad"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "batch-hard triplet", is_triplet))
def test_triplet(case):
    golden = fixtures.arrays(case)
    names = [key.removesuffix("_loss") for key in golden if key.endswith("_loss")]
    for name in names:
        digits = name.partition("margin")[2].replace("p", ".")
        margin = float(digits) if digits else None

        def loss(x, name=name, margin=margin):
            x = unit(x) if name.endswith("_norm") else x
            found = batch_hard(x, golden["labels"], margin=margin)
            return found.loss, found

        (value, found), grad = jax.value_and_grad(loss, has_aux=True)(golden["feat"])
        close(value, golden[f"{name}_loss"])
        close(found.positive, golden[f"{name}_ap"])
        close(found.negative, golden[f"{name}_an"])
        close(grad, golden[f"{name}_grad"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "DC-Former loss", is_total))
def test_total(case):
    golden = fixtures.arrays(case)
    for name in ("sdc", "dwc"):

        def loss(tokens, logits, name=name):
            found = dcformer_loss(tokens, logits, golden["labels"], dynamic=name == "dwc")
            return found.total, found

        (_, found), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            golden["feat"], golden["score"]
        )
        parts = zip(("total", "id", "tri", "div"), found, strict=True)
        for key, value in parts:
            close(value, golden[f"{name}_{key}"])
        close(grads[0], golden[f"{name}_grad_feat"])
        close(grads[1], golden[f"{name}_grad_score"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "samplers", is_samplers))
def test_window_order(case):
    golden = fixtures.arrays(case)
    weights = golden["hard_weight"] / np.linalg.norm(golden["hard_weight"], axis=1, keepdims=True)
    groups = samplers.counts_of_groups(golden["counts"], int(golden["K"]))
    for number, anchor in enumerate(golden["hard_anchor"]):
        similarities = weights @ weights[anchor]
        close(similarities, golden["hard_sim"][number])
        order = samplers.window_order(similarities, groups, int(golden["P"]))
        wanted = golden["hard_pid_seq"][number]
        np.testing.assert_array_equal(np.concatenate([*order]), wanted[wanted >= 0])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "samplers", is_samplers))
def test_pk_keeps_the_published_invariants(case):
    """The published epochs have the properties that ours are held to."""
    golden = fixtures.arrays(case)
    counts, p, k = golden["counts"], int(golden["P"]), int(golden["K"])
    labels = np.repeat(np.arange(len(counts)), counts)
    ours = [np.concatenate([*samplers.pk(labels, p, k, np.random.default_rng(s))]) for s in (0, 1)]
    for epoch in [*golden["pk_epochs"], *ours]:
        epoch = epoch[epoch >= 0]
        batches = labels[epoch].reshape(-1, p, k)
        assert (batches == batches[:, :, :1]).all()
        assert all(len(set(batch[:, 0])) == p for batch in batches)
        whole = counts[labels[epoch]] >= k  # of these nothing is drawn twice
        assert len(set(epoch[whole])) == whole.sum()
        left = samplers.counts_of_groups(counts, k) - np.bincount(
            batches[:, :, 0].ravel(), minlength=len(counts)
        )
        assert (left >= 0).all()
        assert (left > 0).sum() < p


@pytest.mark.parametrize("case", fixtures.cases(AREA, "learning rates by epoch", is_rates))
def test_rates(case):
    """The published rates, and the schedule that a run steps through them with."""
    golden = fixtures.arrays(case)
    epochs = int(golden["epochs"])
    rates = transreid_rates(float(golden["base_lr"]), epochs)
    np.testing.assert_allclose(rates, golden["lr"], rtol=1e-9)
    schedule = by_epoch(rates, 7)
    found = [float(schedule(step)) for step in range(7 * epochs + 3)]
    wanted = [*np.repeat(golden["lr"], 7), *[golden["lr"][-1]] * 3]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
