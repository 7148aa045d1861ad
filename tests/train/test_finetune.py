# SPDX-License-Identifier: Apache-2.0
"""Runs that start from a trained model, on one's own files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from m2jax import bundle, config
from m2jax.checkpoint import folder
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.dist.mesh import make_mesh
from m2jax.models import depth, positions
from m2jax.models import params as params_lib
from m2jax.obs.metrics import read_rows
from m2jax.train import main, origin
from tests.data import own_files
from tests.models import dual_toys

NAMES = ("red", "green", "blue", "yellow", "purple", "cyan", "grey", "black")
COLOURS = (
    *((220, 40, 40), (40, 180, 60), (40, 60, 220), (230, 220, 40)),
    *((150, 40, 160), (40, 200, 210), (128, 128, 128), (10, 10, 10)),
)
MODEL = config.Model(
    width=16,
    heads=2,
    out_dim=8,
    vocab_size=100,
    text_positions=16,
    image_size=16,
    max_text_len=8,
    dtype="float32",
    init="scaled",
)


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    monkeypatch.setattr(main, "make_mesh", lambda spec: make_mesh(spec, jax.devices()[:2]))


def draw(name, rng, *, inverted):
    """A disc of the named colour on white, or, in the other style, its negative."""
    colour = np.asarray(COLOURS[NAMES.index(name)]) + rng.integers(-12, 13, 3)
    image = Image.new("RGB", (32, 32), "white")
    left, top, side = *rng.integers(0, 8, 2), int(rng.integers(18, 24))
    ImageDraw.Draw(image).ellipse([left, top, left + side, top + side], fill=tuple(colour.tolist()))
    return Image.fromarray(255 - np.asarray(image)) if inverted else image


def write(folder_path, seed, count, *, inverted):
    """A TSV of ``count`` drawings of each colour."""
    folder_path.mkdir(parents=True)
    rng, lines = np.random.default_rng(seed), ["path\ten"]
    for name in NAMES * count:
        file = f"{len(lines)}.png"
        draw(name, rng, inverted=inverted).save(folder_path / file)
        lines.append(f"{file}\t{name}")
    (folder_path / "data.tsv").write_text("\n".join(lines) + "\n")
    return folder_path / "data.tsv"


def top1(model, *, inverted):
    """Share of new drawings that are nearest to their own name."""
    rng = np.random.default_rng(99)
    images = [draw(name, rng, inverted=inverted) for name in NAMES * 8]
    tokens = model.tokenize(NAMES)
    text = model.encode_text(tokens.ids, tokens.mask)
    logits = model.logits(model.encode_image(model.preprocess(images)), text)
    return float((np.asarray(logits).argmax(1) == np.arange(len(images)) % len(NAMES)).mean())


def run_config(tsv, steps, *, model=MODEL, resolve=False, finetune=None, **parts):
    data = config.Data(name="tsv", files=(str(tsv),), languages=("any",), batch_size=16)
    loss = config.Loss(contrastive=config.Contrastive(mask_same_caption=True))
    base = config.Experiment(
        model=config.resolve(model) if resolve else model,
        data=data,
        loss=loss,
        optim=config.Optim(learning_rate=5e-3, warmup_steps=5, weight_decay=0.01),
        finetune=finetune or config.Finetune(),
        train=config.Train(steps=steps, log_every=20),
        checkpoint=config.Checkpoint(every=1000),
        eval=config.Eval(suite=""),
    )
    return dataclasses.replace(base, **parts)


def take(begun):
    mesh = make_mesh(config.Mesh(), jax.devices()[:2])
    return origin.take(begun, main.assemble(begun.experiment, mesh, begun.model)[0], mesh)


OPEN = config.Model(dtype="float32", init="scaled")  # all sizes are the source's


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of discs on white."""
    place = tmp_path_factory.mktemp("trained")
    tokenizer = place / "t.model"
    tokenizer.write_bytes(own_files.train_tokenizer([*NAMES], 60))
    tsv = write(place / "plain", 0, 6, inverted=False)
    cfg = run_config(tsv, 80, resolve=True)
    data = dataclasses.replace(cfg.data, tokenizer=str(tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "make_mesh", lambda spec: make_mesh(spec, jax.devices()[:2]))
        main.run(dataclasses.replace(cfg, data=data), place / "run")
    return place / "run"


@pytest.mark.slow
def test_tuning_beats_zero_shot_on_a_held_out_slice(trained, tmp_path):
    before = bundle.load(trained)
    assert top1(before, inverted=False) > 0.7  # it knows the style it was trained on
    zero_shot = top1(before, inverted=True)
    tsv = write(tmp_path / "negative", 1, 6, inverted=True)
    tuned = run_config(tsv, 60, model=OPEN, finetune=config.Finetune(init=str(trained)))
    main.run(tuned, tmp_path / "tuned")
    after = top1(bundle.load(tmp_path / "tuned"), inverted=True)
    assert after > zero_shot + 0.3, (zero_shot, after)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_a_frozen_towers_features_stay_bit_for_bit(trained, tmp_path, tower):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    tuned = config.Finetune(init=str(trained), freeze=tower)
    optim = config.Optim(learning_rate=5e-3, warmup_steps=1, layer_decay=0.7)
    main.run(run_config(tsv, 5, model=OPEN, finetune=tuned, optim=optim), tmp_path / "run")
    old, new = bundle.load(trained), bundle.load(tmp_path / "run")
    tokens = old.tokenize(NAMES)
    pixels = old.preprocess([draw("red", np.random.default_rng(0), inverted=True)])
    same = {
        "image": np.array_equal(old.encode_image(pixels), new.encode_image(pixels)),
        "text": np.array_equal(old.encode_text(*tokens), new.encode_text(*tokens)),
    }
    assert same == {"image": tower == "image", "text": tower == "text"}


@pytest.mark.slow
def test_no_step_is_the_source_and_the_line_says_all(trained, tmp_path, capsys):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    cfg = run_config(tsv, 5, model=OPEN, finetune=config.Finetune(init=str(trained)))
    begun = origin.adopt(cfg)
    assert begun.experiment.model.width == 16
    taken = take(begun)
    source = params_lib.flatten(bundle.load(trained).params)
    for name, value in params_lib.flatten(taken.params).items():
        np.testing.assert_array_equal(value, source[name])
    assert set(taken.kept) == set(source)
    line = origin.describe(begun, taken)
    assert "\n" not in line
    assert f"{len(source)} parameters kept; interpolated: none; fresh: none; left out: none" in line
    main.run(cfg, tmp_path / "run")
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_biases_of_the_sigmoid_loss_are_named_as_fresh(trained, tmp_path):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    cfg = run_config(tsv, 2, model=OPEN, finetune=config.Finetune(init=str(trained)))
    sigmoid = config.Loss(contrastive=config.Contrastive(form="sigmoid", bias_init=-3.0))
    cfg = dataclasses.replace(cfg, loss=sigmoid)
    taken = take(origin.adopt(cfg))
    assert taken.fresh == ("logit_bias", "logit_vl_bias")
    assert float(taken.params["logit_bias"]) == -3.0
    main.run(cfg, tmp_path / "run")
    assert np.isfinite(read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["loss"])


def test_fresh_heads_are_named_and_may_have_another_size(trained, tmp_path):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    tuned = config.Finetune(init=str(trained), heads="fresh")
    cfg = run_config(tsv, 5, model=dataclasses.replace(OPEN, out_dim=4), finetune=tuned)
    begun = origin.adopt(cfg)
    taken = take(begun)
    heads = ("image_head", "image_vl_head", "text_head", "text_vl_head")
    assert sorted(taken.fresh) == [f"{name}.kernel" for name in heads]
    assert taken.params["image_head"]["kernel"].shape == (16, 4)
    assert np.abs(taken.params["image_head"]["kernel"]).max() > 0
    with pytest.raises(UserError, match=r"model\.out_dim is 8 there and 4 in the config"):
        origin.adopt(dataclasses.replace(cfg, finetune=config.Finetune(init=str(trained))))


@pytest.mark.slow
def test_a_changed_resolution_interpolates_positions(trained, tmp_path):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    larger = dataclasses.replace(OPEN, image_size=32)
    cfg = run_config(tsv, 3, model=larger, finetune=config.Finetune(init=str(trained)))
    begun = origin.adopt(cfg)
    assert begun.assets["preprocess"]["size"] == 32
    taken = take(begun)
    assert taken.interpolated == ("image_positions",)
    assert taken.params["image_positions"].shape == (4 * 4 + 3, 16)
    main.run(cfg, tmp_path / "run")
    assert bundle.load(tmp_path / "run").preprocessing.size == 32


def test_interpolation_keeps_special_rows_smooth_fields_and_an_unchanged_grid():
    side, new, width = 6, 9, 4
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rng = np.random.default_rng(0)

    def field(n):  # linear in row and column: any sane interpolation reproduces it inside
        at = (np.arange(n) + 0.5) / n
        row, column = np.meshgrid(at, at, indexing="ij")
        return np.stack([row, column, row + 2 * column, 1 + 0 * row], -1).reshape(n * n, width)

    special = rng.normal(size=(3, width))
    table = jnp.asarray(np.concatenate([special, field(side)]), jnp.float32)
    found = np.asarray(positions.interpolate(table, 3, new * new + 3, where))
    np.testing.assert_allclose(found[:3], special, rtol=1e-6)
    inner = found[3:].reshape(new, new, width)[2:-2, 2:-2]
    np.testing.assert_allclose(inner, field(new).reshape(new, new, width)[2:-2, 2:-2], atol=1e-5)
    same = positions.interpolate(table, 3, side * side + 3, where)
    np.testing.assert_allclose(same, table, atol=1e-6)


def test_another_width_or_shape_is_refused_by_name(trained, tmp_path):
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    tuned = config.Finetune(init=str(trained))
    cfg = run_config(tsv, 5, model=dataclasses.replace(OPEN, width=32), finetune=tuned)
    with pytest.raises(UserError, match=r"model\.width is 16 there and 32 in the config"):
        origin.adopt(cfg)
    begun = origin.adopt(run_config(tsv, 5, model=OPEN, finetune=tuned))
    deeper = dataclasses.replace(begun.model, vl_layers=3)
    larger = dataclasses.replace(begun.experiment, model=deeper)
    other = dataclasses.replace(begun, model=deeper, experiment=larger)
    with pytest.raises(
        UserError, match=r"parameters have other shapes: .*vl\.blocks\.A\.k\.kernel"
    ):
        take(other)


@pytest.mark.slow
def test_a_resumed_run_needs_the_source_no_more(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "source")
    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    cfg = run_config(tsv, 4, model=OPEN, finetune=config.Finetune(init=str(tmp_path / "source")))
    main.run(cfg, tmp_path / "whole")
    half = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, schedule="constant"))
    main.run(dataclasses.replace(half, train=config.Train(steps=2)), tmp_path / "run")
    shutil.rmtree(tmp_path / "source")
    main.run(half, tmp_path / "run")
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [2, 4]
    with pytest.raises(UserError, match="no such directory"):
        main.run(cfg, tmp_path / "new")


def dual_folder(place, family):
    """A model folder of a small dual encoder with our toy tokenizer."""
    cfg = dual_toys.TOYS[family]
    text = dataclasses.replace(cfg.text, vocab_size=100, positions=8)
    cfg = dataclasses.replace(cfg, text=text)
    folder.write(
        place,
        cfg,
        params_lib.initialise(cfg, jax.random.key(3)),
        tokenizer=own_files.TOKENIZER.to_dict(),
        preprocess=Preprocess(cfg.vision.image_size, "white").to_dict(),
    )
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "clip",
        pytest.param("siglip", marks=pytest.mark.slow),
        pytest.param("chinese-clip", marks=pytest.mark.slow),
    ],
)
def test_models_of_other_families_can_be_tuned(tmp_path, family):
    cfg = dual_folder(tmp_path / "source", family)
    tsv = write(tmp_path / "own", 1, 3, inverted=False)
    side = cfg.vision.image_size + cfg.vision.patch_size
    tuned = config.Finetune(init=str(tmp_path / "source"), freeze="text")
    run = run_config(tsv, 40, model=dataclasses.replace(OPEN, image_size=side), finetune=tuned)
    run = dataclasses.replace(run, train=config.Train(steps=40, log_every=1))
    main.run(run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.9 * np.mean([r["loss"] for r in rows[:5]])
    old, new = bundle.load(tmp_path / "source"), bundle.load(tmp_path / "run")
    assert new.config.family == family
    assert new.config.vision.image_size == side
    tokens = old.tokenize(NAMES)
    np.testing.assert_array_equal(old.encode_text(*tokens), new.encode_text(*tokens))


def test_deeper_layers_learn_slower():
    cfg = config.resolve(MODEL)
    model = params_lib.abstract(cfg)
    scales = depth.layer_scales(cfg, model, 0.5)
    shapes = params_lib.flatten(model.params)
    assert set(scales) == set(shapes)
    for name, value in scales.items():
        assert np.broadcast_shapes(value.shape, shapes[name].shape) == shapes[name].shape
    assert scales["text_embed"] == scales["image_positions"] == 0.5**4  # 2 + 1 layers above
    np.testing.assert_array_equal(scales["backbone.blocks.B.q.kernel"].ravel(), [0.125, 0.25])
    np.testing.assert_array_equal(scales["vl.blocks.A.fc1.bias"].ravel(), [0.5])
    assert (
        scales["image_vl_head.kernel"] == scales["logit_scale"] == scales["vl.norms.A.scale"] == 1
    )


@pytest.mark.slow
def test_layer_decay_scales_the_whole_update(trained, tmp_path):
    """Without gradient noise: one step of AdamW moves a parameter by its rate, decay included."""
    from m2jax.optim import make_optimizer

    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3,))}}
    grads = jax.tree.map(jnp.ones_like, params)
    cfg = config.Optim(warmup_steps=0, schedule="constant", clip_norm=0, layer_decay=0.5)
    moved = []
    for scales in (None, {"a.kernel": np.array([[0.25], [0.5]]), "b.kernel": np.array(1.0)}):
        rule = make_optimizer(cfg, 10, scales=scales).transform
        moved.append(rule.update(grads, rule.init(params), params)[0])
    np.testing.assert_allclose(moved[1]["a"]["kernel"][0], 0.25 * moved[0]["a"]["kernel"][0])
    np.testing.assert_allclose(moved[1]["a"]["kernel"][1], 0.5 * moved[0]["a"]["kernel"][1])
    np.testing.assert_array_equal(moved[1]["b"]["kernel"], moved[0]["b"]["kernel"])


@pytest.mark.slow
def test_the_command_line_starts_from_a_model(trained, tmp_path, capsys):
    from m2jax.cli.main import main as cli

    tsv = write(tmp_path / "own", 1, 3, inverted=True)
    words = ["train", "--config", f"finetune:{tsv}", "--workdir", str(tmp_path / "run")]
    words += ["--init", str(trained), "--config.train.steps=2", "--config.data.batch_size=16"]
    assert cli(words) == 0
    assert "parameters kept" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["width"] == 16
    assert saved["finetune"]["init"] == str(trained)
    words[words.index("--init") + 1] = str(tmp_path / "nothing")
    words[words.index("--workdir") + 1] = str(tmp_path / "other")
    assert cli(words) == 2
    assert "no such directory" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
