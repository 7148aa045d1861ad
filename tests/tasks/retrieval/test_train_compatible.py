# SPDX-License-Identifier: Apache-2.0
"""Compatible training through the trainer: equal to the step by hand, and what goes in and out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2jax import config
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.dist.sharding import batch_sharding
from m2jax.losses import compatible as losses
from m2jax.losses.adversarial import adversarial_weight, cross_entropy
from m2jax.models import params as params_lib
from m2jax.models.batch_norm import EPS
from m2jax.optim import by_epoch, make_sgd
from m2jax.tasks import embedder
from m2jax.tasks.retrieval import advbct, train_compatible
from m2jax.tasks.retrieval.compatible import METHODS, CompatibleTask, Settings, as_advbct
from m2jax.tasks.retrieval.statistics import class_statistics
from m2jax.tasks.retrieval.train_compatible import Labelled, Recipe, Stored
from m2jax.train.step import make_step
from m2jax.train.task import Task
from tests.losses.reductions import mesh_of
from tests.tasks.reid.test_reid_train import colours, market, split

START = embedder.start_small(
    width=16, layers=1, heads=2, patch_size=8, height=16, image_width=8, tokens=1
)
PLAIN = Settings(tower=START.tower, pixels=START.pixels, dim=8, epochs=4)
SHORT = Recipe(batch=12, optimizer="adamw", learning_rate=5e-3, log_every=1)
QUIET = {"mesh": mesh_of(1), "show": False}
CLASSES, KNOWN, DIM = 6, 4, 8


def labelled():
    part = split(colours(0, CLASSES), each=6)
    labels = part.labels.identities
    return Labelled(part.images, labels, [f"class {n}" for n in range(CLASSES)])


def stored(seed=0):
    """An old model that sees classes as directions; it has a classifier."""
    rng = np.random.default_rng(seed)
    labels = labelled().labels
    centres = rng.normal(size=(CLASSES, DIM))
    vectors = centres[labels] + 0.3 * rng.normal(size=(len(labels), DIM))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Stored(unit.astype(np.float32), KNOWN, centres[:KNOWN].T.astype(np.float32))


def old():
    return train_compatible.old_of(stored(), labelled().labels, CLASSES)


def batch(step=0):
    data, rows = labelled(), np.arange(0, 36, 3)
    images = START.pixels.of([data.images.read(int(row)) for row in rows])
    vectors = train_compatible.shown(stored(), 0)[rows]
    found = {"image": images, "label": data.labels[rows], "old": vectors}
    return {k: jnp.asarray(v) for k, v in found.items()} | {"step": jnp.full(12, step)}


def filled(method):
    return dataclasses.replace(PLAIN, method=method, classes=CLASSES, steps=3)


def step_of(task, settings, mesh):
    experiment = config.Experiment(
        train=config.Train(steps=12), data=config.Data(batch_size=12), optim=config.Optim()
    )
    rule = make_sgd(by_epoch([0.05], 1), weight_decay=5e-4, frozen=task.frozen)
    return make_step(experiment, task, mesh, optimizer=rule), rule


@pytest.mark.slow
def test_a_step_of_the_trainer_is_advbcts():
    """Loss, gradients and both norms' statistics of the golden-tested function, step by step."""
    settings = filled("advbct")
    task = CompatibleTask(settings, old())
    assert isinstance(task, Task)
    step, _ = step_of(task, settings, mesh_of(1))
    state = step.init()
    params = jax.tree.map(jnp.copy, state.params)
    moments = None
    for number in (0, 5):
        heads, before = as_advbct(params)
        epoch = number // 3

        def loss(pair, before=before, number=number, epoch=epoch):
            tower, heads = pair
            given = batch(number)
            pixels = (given["image"] / 255 - 0.5) / 0.5
            features = params_lib.bind(task.model.graph, tower)(pixels)[:, 0]
            return advbct.loss(
                heads,
                before,
                advbct.Batch(features, given["old"], given["label"]),
                old().classes,
                progress=number / 12,
                adversarial_weight=adversarial_weight(epoch, 4),
            )

        trained = (params["tower"], heads)
        (wanted, (terms, after)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        assert int(terms.violations) > 0
        decayed = jax.tree.map(lambda g, p: g + 5e-4 * p, grads, trained)
        if moments is not None:
            decayed = jax.tree.map(lambda g, m: g + 0.9 * m, decayed, moments)
        moments = decayed
        moved = optax.apply_updates(trained, jax.tree.map(lambda g: -0.05 * g, moments))
        state = dataclasses.replace(state, step=jnp.int32(number))
        given = jax.device_put(batch(number), batch_sharding(mesh_of(1)))
        state, metrics = step.run(state, given)
        assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)
        params = jax.tree.map(jnp.copy, state.params)
        found = as_advbct(params)
        close((params["tower"], found[0]), moved)
        close(found[1], after)
        assert "carried" not in metrics


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_a_refused_step_leaves_the_statistics():
    """What the guard refuses must not move what the norms remember."""
    task = CompatibleTask(filled("none"))
    step, _ = step_of(task, filled("none"), mesh_of(1))
    state = step.init()
    state.params["classifier"]["kernel"] = state.params["classifier"]["kernel"] * jnp.nan
    before = jax.tree.map(np.asarray, state.params["running"])
    given = {name: value for name, value in batch().items() if name != "old"}
    state, metrics = step.run(state, given)
    assert int(metrics["skipped"]) == 1
    for a, b in zip(*map(jax.tree.leaves, (before, state.params["running"])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "advbct"])
def test_other_methods_add_their_loss_and_leave_the_adversary(method):
    task = CompatibleTask(filled(method), None if method == "none" else old())
    params = task.init(jax.random.key(0))
    given = batch()
    (total, _), grads = jax.value_and_grad(task.loss, has_aux=True)(
        params, given, jax.random.key(1)
    )
    heads, state = as_advbct(params)
    pixels = (given["image"] / 255 - 0.5) / 0.5
    features = params_lib.bind(task.model.graph, params["tower"])(pixels)[:, 0]
    z, _ = advbct.embed(heads, state, features, train=True)
    labels, known = np.asarray(given["label"]), old()
    added = {
        "none": lambda: 0.0,
        "bct": lambda: losses.bct(z, labels, stored().classifier),
        "unibct": lambda: losses.unibct(z, labels, known.centres),
        "hot-refresh": lambda: losses.hot_refresh(z, given["old"], labels),
        "lce": lambda: sum(
            losses.lce(
                z,
                known.centres[labels],
                np.append(known.angles, [0, 0])[labels],
                labels < KNOWN,
                heads.classifier.T[labels],
            )
        ),
    }[method]()
    wanted = cross_entropy(z @ heads.classifier, given["label"]) + added
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)
    assert float(added) > 0 or method == "none"
    idle = params_lib.flatten({k: grads[k] for k in ("discriminator", "elastic", "running")})
    assert all(not np.asarray(leaf).any() for leaf in idle.values())
    for name in ("discriminator.fc1.kernel", "elastic", "running.bn.mean"):
        assert task.frozen(name)
    assert not task.frozen("projection.kernel")


@pytest.mark.slow
def test_a_model_comes_out_that_finds_old_vectors(tmp_path):
    """Trained against the old vectors new ones lie near them; trained alone they do not."""
    data, cosines = labelled(), {}
    images = START.pixels.of([data.images.read(row) for row in range(36)])
    for method in ("advbct", "none"):
        settings = dataclasses.replace(PLAIN, method=method, epochs=25)
        given = None if method == "none" else stored()
        made = train_compatible.train(
            data, settings, SHORT, tmp_path / method, stored=given, **QUIET
        )
        read = embedder.read(tmp_path / method)
        found = np.asarray(read.encode_image(images))
        np.testing.assert_allclose(found, made.encode_image(images), atol=1e-6)
        known = data.labels < KNOWN
        cosines[method] = (found * stored().vectors).sum(1)[known].mean()
        assert read.report["classes"] == data.names
        assert read.classifier.shape == (DIM, CLASSES)
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        nearest = (unit @ unit.T - 2 * np.eye(36)).argmax(1)
        assert (data.labels[nearest] == data.labels).mean() > 0.8
    assert cosines["advbct"] > 0.5 + cosines["none"]


def test_the_folded_head_is_the_norm_in_use(tmp_path):
    settings = dataclasses.replace(PLAIN, method="none")
    params = CompatibleTask(filled("none")).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    for name, low in (("mean", -1), ("var", 0.5)):
        params["running"]["bn"][name] = jnp.asarray(rng.uniform(low, 2, DIM), jnp.float32)
        params["bn"] = {k: jnp.asarray(rng.normal(size=DIM), jnp.float32) for k in params["bn"]}
    x = rng.normal(size=(5, 16)).astype(np.float32)
    wanted, _ = advbct.embed(*as_advbct(params), jnp.asarray(x), train=False)
    head = train_compatible.folded(params)
    np.testing.assert_allclose(x @ head["kernel"] + head["bias"], wanted, rtol=1e-4, atol=1e-5)
    assert EPS == 1e-5
    assert settings.method == "none"


def test_known_classes_come_first():
    data = train_compatible.known_first(labelled(), ["class 4", "class 1"])
    assert data.names[:3] == ["class 4", "class 1", "class 0"]
    before = np.array(labelled().names)[labelled().labels]
    np.testing.assert_array_equal(np.array(data.names)[data.labels], before)
    with pytest.raises(UserError, match="class 9"):
        train_compatible.known_first(data, ["class 9"])
    with pytest.raises(UserError, match=r"class 4.*named twice"):
        train_compatible.known_first(data, ["class 4", "class 1", "class 4"])


def test_statistics_are_of_known_classes_and_centres_of_all():
    vectors = stored().vectors.copy()
    vectors[labelled().labels == 5] = 0  # not stored
    found = train_compatible.old_of(Stored(vectors, KNOWN), labelled().labels, CLASSES)
    own = labelled().labels < KNOWN
    wanted = class_statistics(lambda: [(vectors[own], labelled().labels[own])], KNOWN)
    np.testing.assert_allclose(found.classes.centres, wanted.centres, atol=1e-6)
    np.testing.assert_allclose(found.angles, wanted.angle_max, atol=1e-6)
    mean = vectors[labelled().labels == 4].mean(0)
    np.testing.assert_allclose(found.centres[4], mean, atol=1e-5)
    assert not found.centres[5].any()
    shown = train_compatible.shown(Stored(vectors, KNOWN), 0)
    np.testing.assert_allclose(np.linalg.norm(shown, axis=1), np.sqrt(DIM), rtol=1e-5)
    with pytest.raises(UserError, match="no vector of its classes"):
        train_compatible.old_of(Stored(0 * vectors, KNOWN), labelled().labels, CLASSES)


def test_statistics_are_made_some_rows_at_a_time(monkeypatch):
    """Of all rows, by blocks that do not divide them."""
    labels = labelled().labels
    whole, sizes = old(), []

    def made(batches, classes):
        sizes.append([len(vectors) for vectors, _ in batches()])
        return class_statistics(batches, classes)

    monkeypatch.setattr(train_compatible, "ROWS", 5)
    monkeypatch.setattr(train_compatible, "class_statistics", made)
    found = train_compatible.old_of(stored(), labels, CLASSES)
    assert [sum(each) for each in sizes] == [(labels < KNOWN).sum(), len(labels)]
    assert {size for each in sizes for size in each[:-1]} == {5}
    np.testing.assert_allclose(found.classes.radii, whole.classes.radii, atol=1e-6)
    np.testing.assert_allclose(found.centres, whole.centres, atol=1e-6)


def test_rates_are_the_published_steps():
    found = train_compatible.rates(Recipe(), 30)
    wanted = [0.1] * 5 + [0.01] * 5 + [0.001] * 10 + [0.0001] * 10
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


class CalledError(Exception):
    """Ends a training or a command where it would begin."""


def test_an_epochs_order_is_its_own_and_the_same_again(tmp_path, monkeypatch):
    orders = []

    def called(source, order, mesh, batch):
        orders.append(order)
        raise CalledError

    monkeypatch.setattr(train_compatible, "Epochs", called)
    settings = dataclasses.replace(PLAIN, method="none")
    with pytest.raises(CalledError):
        train_compatible.train(labelled(), settings, SHORT, tmp_path / "run", **QUIET)
    first, again, second = (np.stack(orders[0](epoch, {})) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert sorted(first.ravel()) == [*range(36)]
    assert not np.array_equal(first, second)


def test_each_word_reaches_the_training(tmp_path, monkeypatch, capsys):
    seen = []

    def called(data, settings, recipe, out, stored, start):
        seen.append((data, settings, recipe))
        raise CalledError

    monkeypatch.setattr(train_compatible, "train", called)
    root = market(tmp_path / "market")
    words = ["retrieval", "train-compatible", "--data", str(root), "--layout", "market1501"]
    words += ["--out", str(tmp_path / "run"), "--method", "none", "--size", "32x16", "--width"]
    words += ["24", "--layers", "2", "--heads", "4", "--patch", "8", "--dim", "12", "--tau", "0.7"]
    words += ["--epochs", "9", "--batch-size", "10", "--optimizer", "sgd", "--flip", "0.25"]
    assert main([*words, "--pad", "2", "--seed", "5", "--learning-rate", "0.03"]) == 1
    data, settings, recipe = seen[0]
    assert (len(data.labels), settings.method, settings.dim, settings.tau) == (20, "none", 12, 0.7)
    assert (settings.epochs, settings.flip, settings.pad) == (9, 0.25, 2)
    assert (recipe.batch, recipe.optimizer, recipe.seed) == (10, "sgd", 5)
    assert recipe.learning_rate == 0.03
    tower = settings.tower
    assert (tower.height, tower.image_width, tower.width, tower.layers) == (32, 16, 24, 2)
    assert (tower.heads, tower.patch_size, tower.tokens) == (4, 8, 1)
    (tmp_path / "c.txt").write_text("0\n1\n0\n")
    capsys.readouterr()
    more = ["--old-classes", str(tmp_path / "c.txt")]
    assert main([*words, *more]) == 2
    assert "--old-classes: goes with --old-features" in capsys.readouterr().err
    for tau in ("nan", "inf", "-1"):
        assert main([*words, "--tau", tau]) == 2
        assert "--tau" in capsys.readouterr().err


def test_what_excludes_each_other(tmp_path):
    def run(method="advbct", given=None, **changes):
        recipe = dataclasses.replace(SHORT, **changes)
        settings = dataclasses.replace(PLAIN, method=method)
        train_compatible.train(
            labelled(), settings, recipe, tmp_path / "run", stored=given, **QUIET
        )

    with pytest.raises(UserError, match="needs an old model"):
        run()
    with pytest.raises(UserError, match="use one of advbct, bct"):
        run("advbtc", stored())
    with pytest.raises(UserError, match="needs the old model's classifier"):
        run("bct", stored()._replace(classifier=None))
    some = stored()
    some.vectors[3] = 0
    with pytest.raises(UserError, match="old vector of every image"):
        run("hot-refresh", some)
    with pytest.raises(UserError, match="more than the 36 images"):
        run("none", batch=64)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_verb(tmp_path, capsys):
    """A first model, one that searches its vectors, and the same from stored vectors alone."""
    root = market(tmp_path / "market")
    words = ["retrieval", "train-compatible", "--data", str(root), "--layout", "market1501"]
    words += ["--size", "16x8", "--width", "16", "--layers", "1", "--heads", "2", "--patch", "8"]
    words += ["--batch-size", "8", "--epochs", "2", "--dim", "8"]
    old = tmp_path / "old"
    assert main([*words, "--method", "none", "--classes", "0.5", "--out", str(old)]) == 0
    assert main([*words, "--old", str(old), "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    known = len(embedder.read(old).report["classes"])
    assert 2 <= known < 5
    assert f"5 classes ({known} of the old model's), 20 images, 4 steps" in said
    features = str(tmp_path / "f.npz")
    images = str(root / "bounding_box_train")
    assert main(["embed", "--model", str(old), "--images", images, "--out", features]) == 0
    more = ["--old-features", features, "--out", str(tmp_path / "from-features")]
    assert main([*words, *more]) == 0
    assert "5 classes (5 of the old model's)" in capsys.readouterr().out
    assert main([*words, *more[:2], "--out", str(tmp_path / "y"), "--method", "bct"]) == 2
    assert "needs the old model's classifier" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "x")]) == 2
    assert "an old model goes with every method but none" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
