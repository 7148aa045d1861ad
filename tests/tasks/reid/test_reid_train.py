# SPDX-License-Identifier: Apache-2.0
"""Training on a tiny set in the layout of Market-1501, from nothing and from trained towers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from m2jax import config, config_dual
from m2jax.checkpoint import folder
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.eval.sets.records import Made
from m2jax.models import params as params_lib
from m2jax.models.class_tokens import ClassTokenTower, from_vision_tower, tower_of
from m2jax.models.m2 import M2Encoder
from m2jax.obs.metrics import read_rows
from m2jax.tasks import embedder, epochs
from m2jax.tasks.epochs import Epochs, Pictures
from m2jax.tasks.reid import train
from m2jax.tasks.reid.dcformer import Settings
from m2jax.tasks.reid.evaluate import embed, evaluate
from m2jax.tasks.reid.metrics import Labels
from m2jax.tasks.reid.readers import ReidSet, Split
from m2jax.tasks.reid.train import Recipe
from tests.losses.reductions import mesh_of

TOWER = embedder.start_small(
    width=16, layers=1, heads=2, patch_size=8, height=16, image_width=8, tokens=2
).tower
PLAIN = Settings(tower=TOWER, identities=0, erase=0.0, gray=0.0, flip=0.0, pad=1)
QUIET = {"mesh": mesh_of(1), "show": False}
SHORT = Recipe(p=3, k=2, epochs=6, optimizer="adamw", learning_rate=5e-3, log_every=1)


def split(identities, each=4, cameras=2, seed=0):
    """Identities are colours, cameras are brightness; numbers of the identities."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(len(identities)), each)
    camera = np.tile(np.arange(cameras), len(identity) // cameras)
    images = np.asarray(identities)[identity][:, None, None] + 25 * camera[:, None, None, None]
    images = (images + rng.integers(0, 12, (len(identity), 16, 8, 3))).astype(np.uint8)
    made = Made(len(images), lambda row: Image.fromarray(images[row]))
    return Split(made, Labels(identity, camera))


def colours(seed, count):
    return np.random.default_rng(seed).integers(20, 190, (count, 3))


def data():
    test = split(colours(1, 8), seed=1)
    return ReidSet(split(colours(0, 9)), test, test)


def flat(made):
    return {name: np.asarray(leaf) for name, leaf in params_lib.flatten(made.params).items()}


def same(one, other):
    assert flat(one).keys() == flat(other).keys()
    for name, leaf in flat(one).items():
        np.testing.assert_array_equal(leaf, flat(other)[name], err_msg=name)


def test_a_folder_holds_the_model(tmp_path):
    made = train.train(data(), PLAIN, SHORT, tmp_path / "run", **QUIET)
    read = embedder.read(tmp_path / "run")
    same(made, read)
    assert (read.tower, read.pixels) == (made.tower, made.pixels)
    found = [evaluate(each, data(), batch=5)["plain"]["map"] for each in (made, read)]
    assert found[0] == found[1]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # 9 identities x 2 groups over 3 identities a batch: 6 steps an epoch.
    assert [row["step"] for row in rows] == list(range(1, 37))
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates[:6], 5e-3 * (0.01 + 0.99 / 5), rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 0.002 * 5e-3, rtol=1e-4)
    assert rows[-1]["loss/identity"] < rows[0]["loss/identity"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "prototypes"),
    [("pk", "classifier"), ("window", "classifier"), ("nearest", "features")],
)
def test_a_run_that_was_cut_off_goes_on_alike(tmp_path, monkeypatch, batches, prototypes):
    """Stopped within an epoch, whose order hard batches could not list again."""
    recipe = dataclasses.replace(SHORT, batches=batches, epochs=3, save_every=4)
    settings = dataclasses.replace(PLAIN, prototypes=prototypes)
    whole = train.train(data(), settings, recipe, tmp_path / "whole", **QUIET)

    def stop(self, step):
        return step == 9

    with monkeypatch.context() as patch:
        patch.setattr("m2jax.dist.preemption.Preemption.reached", stop)
        with pytest.raises(UserError, match="told to end at step 9: start again"):
            train.train(data(), settings, recipe, tmp_path / "cut", **QUIET)
    assert not (tmp_path / "cut" / embedder.INSIDE).exists()
    same(whole, train.train(data(), settings, recipe, tmp_path / "cut", **QUIET))
    other = dataclasses.replace(recipe, p=2)
    with pytest.raises(UserError, match=r"recipe\.p is 3 there and 2 in this run"):
        train.train(data(), settings, other, tmp_path / "cut", **QUIET)


def orders(batches, prototypes, monkeypatch, tmp_path, count=3):
    """Batches of some epochs, and the classifiers or means that they were listed with."""
    listed, seen = [], []
    real = train.Identities.__call__

    def call(self, epoch, params):
        found = real(self, epoch, params)
        listed.append(np.array([data().train.labels.identities[rows] for rows in found]))
        by_features = prototypes == "features"
        kernel = params["heads"]["kernel"][0].T
        seen.append(np.asarray(params["prototypes"]["mean"] if by_features else kernel))
        return found

    monkeypatch.setattr(train.Identities, "__call__", call)
    recipe = dataclasses.replace(SHORT, batches=batches, epochs=count)
    settings = dataclasses.replace(PLAIN, prototypes=prototypes)
    made = train.train(data(), settings, recipe, tmp_path / batches, **QUIET)
    assert set(made.params) == {"tower"}
    return listed, seen


@pytest.mark.parametrize(
    ("batches", "prototypes"),
    [("window", "classifier"), ("nearest", "classifier"), ("nearest", "features")],
)
def test_hard_batches_follow_what_was_trained(tmp_path, monkeypatch, batches, prototypes):
    """Each batch is an anchor and those most alike to it by the weights as they were then."""
    listed, seen = orders(batches, prototypes, monkeypatch, tmp_path)
    for order, weights in list(zip(listed, seen, strict=True))[1:]:
        unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
        cosines = unit @ unit.T
        first = order[0].reshape(3, 2)[:, 0]  # groups of two images
        nearest = np.argsort(-cosines[first[0]], kind="stable")[:3]
        assert first.tolist() == nearest.tolist()
    assert all((np.bincount(order[0]) % 2 == 0).all() for order in listed)


def test_means_are_those_of_the_features(tmp_path, monkeypatch):
    """At a rate of nothing the tower stays, and each identity's mean is that of its images."""
    recipe = dataclasses.replace(SHORT, batches="nearest", epochs=2, learning_rate=1e-12)
    settings = dataclasses.replace(PLAIN, prototypes="features", pad=0)
    seen = []
    real = train.Identities.__call__

    def call(self, epoch, params):
        seen.append(np.asarray(params["prototypes"]["mean"]))
        return real(self, epoch, params)

    monkeypatch.setattr(train.Identities, "__call__", call)
    made = train.train(data(), settings, recipe, tmp_path / "run", **QUIET)
    assert not seen[0].any()
    split = data().train
    images = [split.images.read(row) for row in range(len(split.images))]
    tower = params_lib.bind(embedder._graph(made.tower), made.params["tower"])
    tokens = np.asarray(tower(made.pixels.standardised(jnp.asarray(made.preprocess(images))))[:, 0])
    # Four images each, two of them a batch: the first two's mean, moved by the second two's.
    for identity, row in enumerate(seen[1]):
        own = tokens[split.labels.identities == identity]
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        means = [0.9 * own[[*p]].mean(0) + 0.1 * np.delete(own, p, 0).mean(0) for p in pairs]
        assert min(np.abs(row - mean).max() for mean in means) < 1e-5
    with pytest.raises(UserError, match="random batches look at none: take batches window or"):
        train.train(
            data(), settings, dataclasses.replace(recipe, batches="pk"), tmp_path / "x", **QUIET
        )


def test_what_prepares_ahead_takes_nothing_twice():
    """An endless run of short epochs gives each epoch's rows once, whatever was read ahead."""
    rows = data().train
    source = Pictures(rows.images, embedder.Pixels(height=16, width=8), {"row": np.arange(36)})

    def order(epoch, params):
        return epochs.shuffled(36, 12, np.random.default_rng(epoch))

    loader = Epochs(source, order, mesh_of(1), 12)
    taken, steps = [], []
    for _ in range(9):
        loader.prepare({})
        batch = next(loader)
        taken.append(np.asarray(batch["row"]))
        steps.append(np.asarray(batch["step"]))
    loader.close()
    for epoch in range(3):
        assert sorted(np.concatenate(taken[3 * epoch :][:3])) == list(range(36))
    assert not np.array_equal(taken[0], taken[3])
    np.testing.assert_array_equal(np.stack(steps), np.arange(9)[:, None].repeat(12, 1))


@pytest.mark.slow
def test_an_m2_tower_to_start_from():
    """With one class token in its old place the tower is the model's own image side."""
    cfg = config.resolve(
        config.Model(
            width=16,
            heads=2,
            backbone_layers=2,
            vl_layers=1,
            out_dim=8,
            image_size=16,
            patch_size=8,
            vocab_size=32,
            max_text_len=4,
            text_positions=6,
            init="scaled",
            dtype="float32",
        )
    )
    model = M2Encoder(cfg, nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(model))
    noise = iter(jax.random.split(jax.random.key(7), 1000))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params)
    tower = tower_of(cfg, tokens=1, height=16, image_width=16)
    assert tower.family == "m2"
    taken = from_vision_tower(params, tower, jax.random.key(0))
    taken["positions"] = taken["positions"].at[0].set(params["image_positions"][2])
    pixels = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    ours = params_lib.bind(params_lib.abstract_of(lambda r: ClassTokenTower(r, tower)).graph, taken)
    found = ours((pixels - 0.5) / 0.5)[:, 0]
    theirs = params_lib.bind(params_lib.abstract(cfg).graph, params)
    np.testing.assert_allclose(found, theirs.encode_image(pixels).vl.tokens[:, 0], atol=2e-5)
    with pytest.raises(UserError, match="differ from the config"):
        from_vision_tower(params, dataclasses.replace(tower, layers=3), jax.random.key(0))
    with pytest.raises(UserError, match="no parameters of an M2-Encoder"):
        from_vision_tower({}, tower, jax.random.key(0))


def test_towers_that_cannot_be():
    siglip = config_dual.Dual(family="siglip", vision=config_dual.Vision(pooling="map"))
    with pytest.raises(UserError, match="siglip tower has no class token"):
        tower_of(siglip)
    clip = tower_of(config_dual.Dual(), tokens=4, height=64, image_width=32)
    assert (clip.activation, clip.pre_norm, clip.eps) == ("quick_gelu", True, 1e-5)
    assert (clip.tokens, clip.grid, clip.stride) == (4, (2, 1), (32, 32))
    with pytest.raises(UserError, match="use one of plain, m2"):
        ClassTokenTower(nnx.Rngs(0), dataclasses.replace(TOWER, family="swin"))


def test_folders_that_cannot_be(tmp_path):
    start = embedder.start_small(width=8, layers=1, heads=1, patch_size=8, tokens=1, height=8)
    start = start.tower
    params = {"tower": nnx.to_pure_dict(nnx.state(ClassTokenTower(nnx.Rngs(0), start)))}
    made = embedder.Embedder(tower=start, pixels=embedder.Pixels(height=8, width=32), params=params)
    embedder.write(tmp_path / "fine", made)
    same(made, embedder.read(tmp_path / "fine"))
    card = json.loads((tmp_path / "fine" / "embedder.json").read_text())

    def spoilt(**changes):
        text = json.dumps({**card, **changes})
        (tmp_path / "fine" / "embedder.json").write_text(text)
        with pytest.raises(UserError) as error:
            embedder.read(tmp_path / "fine")
        return str(error.value)

    assert "not those of the sizes" in spoilt(tower={**card["tower"], "width": 16})
    assert "pixels are not the tower's" in spoilt(pixels={**card["pixels"], "height": 16})
    assert "no such key" in spoilt(tower={**card["tower"], "depth": 1})
    assert "do not fit together" in spoilt(tower={**card["tower"], "heads": 0})
    assert "do not fit together" in spoilt(tower={**card["tower"], "stride": [0, 8]})
    assert "activation" in spoilt(tower={**card["tower"], "activation": "relu"})
    assert "damaged" in spoilt(report=None)
    assert "another format" in spoilt(format=2)


def test_side_information_reaches_the_features():
    tower = dataclasses.replace(TOWER, cameras=2)
    params = {"tower": nnx.to_pure_dict(nnx.state(ClassTokenTower(nnx.Rngs(0), tower)))}
    made = embedder.Embedder(tower=tower, pixels=embedder.Pixels(height=16, width=8), params=params)
    images = np.zeros((2, 16, 8, 3), np.uint8)
    plain = made.encode_image(images)
    np.testing.assert_array_equal(plain[0], plain[1])
    told = made.encode_image(images, np.array([0, 1]))
    assert np.abs(told[0] - told[1]).max() > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(told, axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="camera 2: the model knows 2"):
        made.encode_image(images, np.array([0, 2]))

    side = Split(
        Made(5, lambda row: Image.new("RGB", (8, 16), (40 * row, 9, 9))),
        Labels(np.zeros(5, int), np.array([1, 0, 1, 1, 0])),
    )
    found = embed(made, side, 2, lambda done: None)
    pixels = made.preprocess([side.images.read(row) for row in range(5)])
    np.testing.assert_allclose(found, made.encode_image(pixels, side.labels.cameras), atol=1e-6)


def market(root):
    """Five identities by two cameras, in files."""
    for part, first, count in (("bounding_box_train", 1, 5), ("query", 11, 3)):
        (root / part).mkdir(parents=True)
        drawn = split(colours(first, count))
        for row in range(len(drawn.images)):
            identity, camera = (int(each[row]) for each in drawn.labels)
            name = f"{identity + first:04d}_c{camera + 1}s1_{row:06d}_00.png"
            drawn.images.read(row).save(root / part / name)
    (root / "query").rename(root / "bounding_box_test")
    (root / "query").mkdir()
    for file in sorted((root / "bounding_box_test").glob("*c1s1*"))[::2]:
        file.rename(root / "query" / file.name)
    return root


@pytest.mark.slow
def test_the_verb(tmp_path, capsys, monkeypatch):
    """Market-1501's layout in, a model out, figures of it, and its features by m2jax embed."""
    root = market(tmp_path / "market")
    words = ["reid", "train", "--data", str(root), "--layout", "market1501"]
    words += ["--out", str(tmp_path / "run"), "--size", "16x8", "--width", "16", "--layers", "1"]
    words += ["--heads", "2", "--patch", "8", "--p", "4", "--k", "2", "--epochs", "2"]
    assert main([*words, "--batches", "nearest", "--scenes", "confusion", "--seed", "3"]) == 0
    assert "5 identities, 20 images" in capsys.readouterr().out
    measure = ["reid", "eval", "--model", str(tmp_path / "run"), "--data", str(root)]
    assert main([*measure, "--layout", "market1501", "--json", str(tmp_path / "r.json")]) == 0
    assert 0 < json.loads((tmp_path / "r.json").read_text())["plain"]["map"] <= 1
    out = str(tmp_path / "f.npz")
    images = str(root / "query")
    assert main(["embed", "--model", str(tmp_path / "run"), "--images", images, "--out", out]) == 0
    with np.load(out) as held:
        assert held["features"].shape == (3, 32)
    (tmp_path / "t.txt").write_text("a bird")
    texts = ["--texts", str(tmp_path / "t.txt")]
    assert main(["embed", "--model", str(tmp_path / "run"), *texts, "--out", out]) == 2
    assert "embeds images alone" in capsys.readouterr().err
    again = [*words, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr("m2jax.dist.preemption.Preemption.reached", lambda self, step: step == 1)
        assert main(again) == 42
    assert "told to end at step 1: start again" in capsys.readouterr().out
    assert main(again) == 0
    for more in (["--p", "8"], ["--heads", "0"]):
        assert main([*words, *more, "--out", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()
    capsys.readouterr()
    assert main([*words, "--size", "16"]) == 2
    assert "write HxW" in capsys.readouterr().err
    assert main([*words, "--batches", "all"]) == 2
    assert main([*words, "--p", "3"]) == 2
    assert "6 does not divide over 8 devices" in capsys.readouterr().err


def model_folder(directory, cfg):
    """A model of random weights, as m2jax convert leaves one."""
    params = params_lib.initialise(cfg, jax.random.key(0))
    side = cfg.vision.image_size if isinstance(cfg, config_dual.Dual) else cfg.image_size
    preprocess = Preprocess(side).to_dict()
    folder.write(directory, cfg, params, tokenizer=None, preprocess=preprocess)
    return params


def small(family):
    sizes = {"width": 16, "heads": 2}
    if family == "m2":
        more = {"backbone_layers": 1, "vl_layers": 1, "out_dim": 8, "patch_size": 8}
        text = {"vocab_size": 32, "max_text_len": 4, "text_positions": 6}
        return config.resolve(config.Model(**sizes, **more, **text, image_size=16))
    sizes |= {"layers": 1, "mlp_width": 32}
    vision = config_dual.Vision(**sizes, image_size=16, patch_size=8)
    text = config_dual.Text(**sizes, vocab_size=32, positions=4)
    return config_dual.Dual(vision=vision, text=text, out_dim=8)


@pytest.mark.parametrize("family", ["m2", "clip"])
def test_a_model_folder_to_start_from(tmp_path, family):
    cfg = small(family)
    source = model_folder(tmp_path / "model", cfg)
    start = embedder.start_from(
        str(tmp_path / "model"), tokens=2, height=16, image_width=8, stride=(4, 4)
    )
    params = source["vision"] if family == "clip" else source
    for one, other in zip(jax.tree.leaves(start.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (start.tower.width, start.tower.stride) == (16, (4, 4))
    mean = config_dual.Vision().mean if family == "clip" else (0.5, 0.5, 0.5)
    assert start.pixels.mean == mean
    settings = dataclasses.replace(PLAIN, tower=start.tower, mean=mean, std=start.pixels.std)
    recipe = dataclasses.replace(SHORT, epochs=1, optimizer="sgd", learning_rate=1e-9)
    made = train.train(data(), settings, recipe, tmp_path / "run", start=start.params, **QUIET)
    embed = params["vision_embed"] if family == "m2" else params
    np.testing.assert_allclose(made.params["tower"]["kernel"], embed["kernel"], atol=1e-5)
    assert embedder.read(tmp_path / "run").pixels.mean == mean
