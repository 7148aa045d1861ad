# SPDX-License-Identifier: Apache-2.0
"""SyCoCa as a task: each objective against its formula, no leaks, and whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.bundle import load
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.losses import masked as masked_lib
from m2jax.models import params as params_lib
from m2jax.obs.metrics import read_rows
from m2jax.train import main
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step
from m2jax.train.sycoca import SyCoCaTask
from tests.models.dual_toys import TOYS
from tests.train import toy


def experiment(monkeypatch, *, caption=None, masked_image=None, steps=4, **model):
    base = toy.experiment(monkeypatch, steps=steps)
    loss = config.Loss(
        contrastive=config.Contrastive(weight=0.5),
        caption=config.Caption(**{"weight": 2.0, "layers": 2, "positions": 2, **(caption or {})}),
        masked_image=config.MaskedImage(**{"weight": 1.5, "layers": 1, **(masked_image or {})}),
    )
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    model = {"dtype": dtype, "param_dtype": dtype, "patch_size": 4, **model}
    return dataclasses.replace(base, loss=loss, model=dataclasses.replace(base.model, **model))


def setting(cfg):
    task = SyCoCaTask(cfg)
    params = jax.jit(task.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, toy.ToySource(cfg).batch(0, slice(None)))
    batch["text_mask"] = batch["text_mask"].at[1:, :, 4:].set(False)
    return task, params, batch


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_the_loss_is_the_weighted_sum_and_its_encoder_starts_as_without_heads(wide, monkeypatch):
    cfg = experiment(monkeypatch)
    task, params, batch = setting(cfg)
    rng = jax.random.key(3)
    total, metrics = jax.jit(task.loss)(params, batch, rng)
    itc = ImageTextTask(cfg)
    contrast, _ = jax.jit(itc.loss)(params, batch, jax.random.fold_in(rng, 0))
    expected = contrast + 2.0 * metrics["loss/caption"] + 1.5 * metrics["loss/masked_image"]
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    alone = jax.jit(itc.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, alone, {k: params[k] for k in alone})


def test_texts_in_whichever_language_bring_their_tags(monkeypatch):
    """Rows of one text each lose as the same texts do where their places tell the language."""
    both = experiment(monkeypatch, masked_image={"weight": 0.0})
    task, params, batch = setting(both)
    data = dataclasses.replace(both.data, languages=("any",), views=1)
    alone = SyCoCaTask(dataclasses.replace(both, data=data))
    assert alone.model.params["heads"] == task.model.params["heads"]
    spec = alone.batch_spec(16)
    assert spec["language"].shape == (16, 1)
    assert "language" not in task.batch_spec(16)
    picked = {"image": batch["image"][:, :1], "concept": batch["concept"]}

    @jax.jit
    def lost(language, told):
        texts = {k: batch[k][:, language][:, None] for k in ("text", "text_mask")}
        told = jnp.full((16, 1), told)
        return alone.loss(params, picked | texts | {"language": told}, jax.random.key(0))[1]

    found = np.array([[lost(text, told)["loss/caption"] for told in (0, 1)] for text in (0, 1)])
    assert np.abs(np.diff(found, axis=1)).min() > 1e-6  # the tag is seen
    twin = {**batch, "image": batch["image"][:, :1].repeat(2, axis=1)}
    whole = jax.jit(task.loss)(params, twin, jax.random.key(0))[1]["loss/caption"]
    words = np.asarray(batch["text_mask"][:, :, 1:].sum((0, 2)))
    expected = (found[0, 0] * words[0] + found[1, 1] * words[1]) / words.sum()
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    painted = dataclasses.replace(
        alone.experiment, loss=experiment(monkeypatch, caption={"weight": 0.0}).loss
    )
    lone = SyCoCaTask(painted)  # no captions: such a batch tells no languages
    assert "language" not in lone.batch_spec(16)
    texts = {k: batch[k][:, :1] for k in ("text", "text_mask")}
    shapes = jax.eval_shape(lone.init, jax.random.key(0)), picked | texts, jax.random.key(0)
    assert "loss/masked_image" in jax.eval_shape(lone.loss, *shapes)[1]
    with pytest.raises(UserError, match=r"loss.caption.languages=\('fr',\): lacks 'en'"):
        SyCoCaTask(experiment(monkeypatch, caption={"languages": ("fr",)}))


def relevant(params, forward, image, text, which, count=4):
    """The patches of an image that fit a text best or worst, by cosine, in their order; NumPy."""
    mapped = np.asarray(forward.image.vl.tokens)[image][1:] @ params["image_vl_head"]["kernel"]
    unit = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
    order = np.argsort(unit @ np.asarray(forward.text.features)[text])
    return np.sort(order[-count:] if which == "high" else order[:count])


@pytest.mark.parametrize("patches", ["all", "high", "low"])
def test_captioning_is_the_papers_sum_over_words(wide, monkeypatch, patches):
    """Against the decoder's states and plain NumPy: a tag and words i < t predict word t.

    With ``high`` it sees [CLS] and the quarter of the patches that fits the text best.
    """
    caption = {"patches": patches, "ratio": 0.25}
    cfg = experiment(monkeypatch, caption=caption, masked_image={"weight": 0.0})
    task, params, batch = setting(cfg)
    rng = jax.random.key(3)
    forward = jax.jit(task.itc.forward)(params, batch, jax.random.fold_in(rng, 0))
    head = params_lib.bind(task.heads.graph, params["heads"]).caption
    write = jax.jit(lambda words, language, memory: head(words, language, memory))
    table = np.asarray(params["text_embed"])
    lost, counted = 0.0, 0
    for row in range(3):
        for language in range(2):
            ids = np.asarray(batch["text"][row, language])
            # Text j goes with view j of two: image (row, view) lies at 2 row + view.
            pair = 2 * row + language
            memory = forward.image.vl.tokens[pair][None]
            if patches != "all":
                seen = relevant(params, forward, pair, pair, patches)
                memory = memory[:, np.array([0, *(seen + 1)])]
            words = jnp.asarray(table[ids[1:-1]])[None]
            states = np.asarray(write(words, jnp.asarray([language]), memory))[0]
            logits = states @ table[: cfg.model.vocab_size].T
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for place, word in enumerate(ids[1:]):
                if batch["text_mask"][row, language, place + 1]:
                    lost -= log_p[place, word]
                    counted += 1
    few = {
        **batch,
        "text_mask": batch["text_mask"].at[3:, :, 1:].set(False),
    }  # the rest counts nothing
    _, metrics = jax.jit(task.loss)(params, few, rng)
    np.testing.assert_allclose(metrics["loss/caption"], lost / counted, rtol=1e-10)


def test_painting_is_the_mean_square_over_the_patches_that_fit_the_text(wide, monkeypatch):
    """Selection, targets, the last map and the mean in NumPy around encoder and decoder."""
    cfg = experiment(monkeypatch, caption={"weight": 0.0}, masked_image={"ratio": 0.25})
    task, params, batch = setting(cfg)
    rng = jax.random.key(3)
    forward = jax.jit(task.itc.forward)(params, batch, jax.random.fold_in(rng, 0))
    masked = np.zeros((32, 16), bool)
    for pair in range(32):
        masked[pair, relevant(params, forward, pair, pair, "high")] = True

    def states(params, pixels, masked):
        model, heads = task.itc.bind(params), params_lib.bind(task.heads.graph, params["heads"])
        text = model.encode_text(batch["text"].reshape(32, 6), batch["text_mask"].reshape(32, 6))
        tokens = model.encode_image(pixels, masked=masked).vl.tokens
        mask = batch["text_mask"].reshape(32, 6)
        return heads.masked_image.decoder(tokens, text.vl.tokens, memory_mask=mask)

    pixels = np.asarray(forward.pixels)
    last = jax.tree.map(np.asarray, params["heads"]["masked_image"]["out"])
    found = np.asarray(jax.jit(states)(params, forward.pixels, masked))[:, 1:]
    found = found @ last["kernel"] + last["bias"]
    errors = []
    for pair, place in np.argwhere(masked):
        row, column = divmod(place, 4)
        patch = pixels[pair, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
        target = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)
        errors.append(((found[pair, place] - target) ** 2).mean())
    _, metrics = jax.jit(task.loss)(params, batch, rng)
    np.testing.assert_allclose(metrics["loss/masked_image"], np.mean(errors), rtol=1e-10)


def test_what_the_padding_holds_changes_no_objective(wide, monkeypatch):
    task, params, batch = setting(experiment(monkeypatch, caption={"patches": "high"}))
    loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(3)))
    other = jnp.where(batch["text_mask"], batch["text"], batch["text"] ^ 1)
    before, after = loss(batch), loss({**batch, "text": other})
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_word_is_told_by_those_before_it_alone(wide, monkeypatch):
    task, params, batch = setting(experiment(monkeypatch, masked_image={"weight": 0.0}))
    only = jnp.zeros_like(batch["text_mask"]).at[:, :, jnp.asarray([0, 3])].set(True)
    lost = jax.jit(lambda text: task.loss(params, {**batch, "text": text, "text_mask": only},
                                          jax.random.key(3))[1]["loss/caption"])  # fmt: skip
    before = float(lost(batch["text"]))
    for place in (4, 5):  # the word that is told stands at 3
        assert float(lost(batch["text"].at[:, :, place].set(9))) == before
    for place in (1, 2):
        assert abs(float(lost(batch["text"].at[:, :, place].set(9))) - before) > 1e-6


def painted(task, params, batch, mask, pixels):
    """What the patch head paints for given masks, pixels and texts."""
    return np.asarray(jax.jit(functools.partial(_painted, task))(params, batch, mask, pixels))


def _painted(task, params, batch, mask, pixels):
    model, heads = task.itc.bind(params), params_lib.bind(task.heads.graph, params["heads"])
    text = model.encode_text(batch["text"][:, 0], batch["text_mask"][:, 0]).vl.tokens
    tokens = model.encode_image(pixels, masked=mask).vl.tokens
    return heads.masked_image(tokens, text, batch["text_mask"][:, 0])


def test_a_masked_patch_gives_nothing_away_and_the_text_is_read(wide, monkeypatch):
    task, params, batch = setting(experiment(monkeypatch))
    pixels = jnp.asarray(np.random.default_rng(0).random((16, 16, 16, 3)))
    mask = np.zeros((16, 16), bool)
    mask[:, 5] = True  # row 1, column 1 of four by four
    params = jax.tree.map(lambda x: x, params)
    params["vision_embed"]["mask_token"] = jnp.ones_like(params["vision_embed"]["mask_token"])
    before = painted(task, params, batch, mask, pixels)
    hidden = painted(task, params, batch, mask, pixels.at[:, 4:8, 4:8].set(0.25))
    np.testing.assert_array_equal(hidden, before)
    shown = painted(task, params, batch, mask, pixels.at[:, 4:8, 8:12].set(0.25))
    assert (np.abs(shown - before).max((0, 2)) > 1e-4).all()
    other = {**batch, "text": batch["text"].at[:, 0, 2].set(7)}
    assert (np.abs(painted(task, params, other, mask, pixels) - before).max((0, 2)) > 1e-5).all()
    padding = {**batch, "text": batch["text"].at[1:, 0, 5].set(7)}  # masked out there
    np.testing.assert_array_equal(painted(task, params, padding, mask, pixels)[1:], before[1:])


@pytest.mark.parametrize("which", ["high", "low", "random"])
def test_masks_have_the_ratio_and_the_direction(wide, monkeypatch, which):
    cfg = experiment(monkeypatch, masked_image={"patches": which, "ratio": 0.25})
    task, params, batch = setting(cfg)
    seen = []  # what the loss calls, as it is traced
    for name in ("masked_pixel_loss", "chosen"):
        real = getattr(masked_lib, name)
        monkeypatch.setattr(masked_lib, name, lambda *x, real=real: (seen.append(x), real(*x))[1])

    def traced(params, batch):
        seen.clear()
        task.loss(params, batch, jax.random.key(3))
        return seen[0][0], seen[-1][2]  # scores, mask

    scores, mask = map(np.asarray, jax.jit(traced)(params, batch))
    np.testing.assert_array_equal(mask.sum(1), 4)
    for row, chosen in zip(scores, mask, strict=True):
        if which != "random":
            order = np.argsort(row)
            assert set(np.flatnonzero(chosen)) == set(order[-4:] if which == "high" else order[:4])


@pytest.mark.slow
def test_gradients_are_those_of_differences(wide, monkeypatch):
    cfg = experiment(monkeypatch, caption={"patches": "high", "ratio": 0.5})
    task, params, batch = setting(cfg)
    loss = jax.jit(lambda p: task.loss(p, batch, jax.random.key(3))[0])
    grads = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    step = 1e-6
    moved = [
        loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))
        for sign in (1, -1)
    ]
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)))
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), along, rtol=2e-5)


@pytest.mark.slow
def test_eight_devices_equal_one(monkeypatch):
    cfg = experiment(monkeypatch)
    found = []
    for spec, devices in ((config.Mesh(), 1), (config.Mesh(data=2, fsdp=2, model=2), 8)):
        mesh = make_mesh(spec, jax.devices()[:devices])
        task = SyCoCaTask(cfg, mesh)
        step = make_step(cfg, task, mesh)
        _, metrics = step.run(step.init(), toy.ToySource(cfg).batch(0, slice(None)))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_learns_and_leaves_an_encoder_that_loads(tmp_path, monkeypatch):
    real = toy.ToySource.batch
    monkeypatch.setattr(toy.ToySource, "batch", lambda self, _, rows: real(self, 0, rows))
    cfg = experiment(monkeypatch, steps=12)  # on one batch, again and again
    main.run(cfg, tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    for name in ("loss/caption", "loss/masked_image", "loss/vl"):
        assert rows[-1][name] < rows[0][name] - 0.01
    assert "heads" not in load(tmp_path).params


def test_the_mask_token_learns_with_patches_to_paint_alone(monkeypatch):
    name = "vision_embed.mask_token"
    assert not SyCoCaTask(experiment(monkeypatch)).frozen(name)
    assert SyCoCaTask(experiment(monkeypatch, masked_image={"weight": 0.0})).frozen(name)


@pytest.mark.parametrize("off", ["caption", "masked_image"])
def test_a_model_of_another_family_is_refused_not_trained_without(monkeypatch, off):
    cfg = experiment(monkeypatch, **{off: {"weight": 0.0}})
    with pytest.raises(UserError, match="a clip model has no such heads: set them to 0"):
        main.assemble(cfg, make_mesh(config.Mesh(), jax.devices()[:1]), TOYS["clip"])


def test_dropped_patches_cannot_be_painted(monkeypatch):
    with pytest.raises(UserError, match=r"patch_drop=0.5: .*masked_image.weight to 0"):
        SyCoCaTask(experiment(monkeypatch, patch_drop=0.5))
