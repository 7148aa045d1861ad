# SPDX-License-Identifier: Apache-2.0
"""Folders of other libraries in and out, end to end and without those libraries."""

import dataclasses
import json
import re
import sys
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

import m2jax
from m2jax.checkpoint.convert import dual_names, open_clip_config, outward
from m2jax.cli.main import main
from m2jax.config import Mesh, UserError
from m2jax.config_dual import FAMILIES
from m2jax.data.image import Preprocess
from m2jax.data.siglip_text import SiglipTokenizer
from m2jax.data.text import train_tokenizer
from m2jax.dist.mesh import make_mesh
from m2jax.models import params as params_lib
from tests.models.dual_toys import TOYS, inputs, random_params


class Model(NamedTuple):
    """What ``export`` takes."""

    config: object
    params: dict
    tokenizer: object
    preprocessing: Preprocess


def toy(family, *, layout="hf", tokenizer=None):
    """A model that the layout can hold: open_clip's SigLIP and cn_clip fix more than others do."""
    cfg = TOYS[family]
    vision, text = cfg.vision, cfg.text
    if layout == "open-clip" and family == "siglip":
        vision = dataclasses.replace(vision, image_size=24, activation="gelu")
    if layout == "open-clip" and family == "chinese-clip":
        vision = dataclasses.replace(vision, image_size=24, heads=1)
        text = dataclasses.replace(text, heads=1)
    cfg = dataclasses.replace(cfg, vision=vision, text=text)
    size = cfg.vision.image_size
    steps = Preprocess(size)
    if family == "clip":
        steps = Preprocess(size, shortest=size, cut="even" if layout == "open-clip" else "floor")
    return Model(cfg, random_params(cfg), tokenizer, steps)


@pytest.fixture
def small_trunk(monkeypatch):
    trunk = open_clip_config.Trunk(width=32, layers=3, heads=4, mlp_width=48)
    monkeypatch.setitem(open_clip_config.TRUNKS, "base", trunk)


def same_params(a, b):
    other = params_lib.flatten(b)
    for name, array in params_lib.flatten(a).items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.usefixtures("small_trunk")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["hf", "open-clip"])
def test_out_in_and_out_again(tmp_path, capsys, family, layout):
    model = toy(family, layout=layout)
    outward.export(model, tmp_path / "theirs", format=layout)
    source, made = str(tmp_path / "theirs"), tmp_path / "ours"
    assert main(["convert", "import", source, str(made), "--arch", family]) == 0
    told = capsys.readouterr().out
    assert f"{family}, layout {layout}, parameters float32" in told
    for probe in ("image", "text", "scales"):
        assert re.search(rf"^{probe} .* ok$", told, re.MULTILINE)
    bundle = m2jax.load(made)
    same_params(model.params, bundle.params)
    assert bundle.preprocessing == model.preprocessing
    pixels, ids, mask = inputs(model.config)
    direct = params_lib.bind(params_lib.abstract(model.config).graph, model.params)
    image, text = bundle.encode_image(pixels), bundle.encode_text(ids, mask)
    np.testing.assert_allclose(image, direct.encode_image(pixels).features, atol=2e-6)
    np.testing.assert_allclose(text, direct.encode_text(ids, mask).features, atol=2e-6)
    scale, bias = np.exp(model.params["logit_scale"]), model.params.get("logit_bias", 0.0)
    np.testing.assert_allclose(bundle.logits(image, text), scale * (image @ text.T) + bias, 1e-5)
    outward.export(bundle, tmp_path / "again", format=layout)
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def crossed(rules, one, other):
    """A table in which two rules of one shape have changed places."""
    swap = {one: rules[other], other: rules[one]}
    return {name: swap.get(name, rule) for name, rule in rules.items()}


def straight(rules, name):
    """A table in which a square matrix is taken as it is."""
    return rules | {name: rules[name]._replace(turn="")}


LAYER = "{at}.encoder.layers.{{n}}.{part}.weight"
PLANTED = {
    "queries for keys": lambda t: crossed(
        t, *(LAYER.format(at="text_model", part=f"self_attn.{x}_proj") for x in "qk")
    ),
    "towers exchanged": lambda t: crossed(
        t, *(LAYER.format(at=f"{x}_model", part="mlp.fc1") for x in ("text", "vision"))
    ),
    "norms exchanged": lambda t: crossed(
        t, *(LAYER.format(at="vision_model", part=f"layer_norm{i}") for i in (1, 2))
    ),
    "a square matrix not transposed": lambda t: straight(
        t, LAYER.format(at="vision_model", part="self_attn.out_proj")
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_check_sees_a_wrong_table(tmp_path, capsys, monkeypatch, planted):
    folder, key = exported(tmp_path), ("clip", "hf")
    monkeypatch.setitem(dual_names._TABLES, key, PLANTED[planted](dual_names._TABLES[key]))
    assert main(["convert", "import", str(folder), str(tmp_path / "out")]) == 4
    assert "FAIL" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_check_can_be_left_out(tmp_path, capsys):
    words = [str(exported(tmp_path)), str(tmp_path / "out"), "--no-check"]
    assert main(["convert", "import", *words]) == 0
    assert "not checked" in capsys.readouterr().out


def test_a_folder_of_transformers_loads_as_it_is(tmp_path):
    made = SiglipTokenizer(train_tokenizer(["a red cat", "two dogs"] * 3, 40), 10)
    model = toy("siglip", tokenizer=made)
    outward.export(model, tmp_path / "theirs", format="hf")
    bundle = m2jax.load(tmp_path / "theirs")
    same_params(model.params, bundle.params)
    np.testing.assert_array_equal(bundle.tokenize(["Red cat!"]).ids, made(["red cat"]).ids)
    assert main(["convert", "import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    again = m2jax.load(tmp_path / "ours")
    np.testing.assert_array_equal(again.tokenize(["Red cat!"]).ids, made(["red cat"]).ids)
    settings = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 22, "width": 22}
    assert settings["image_mean"] == [0.5, 0.5, 0.5]


def test_a_repository_of_the_hub_loads_by_its_name(tmp_path, monkeypatch):
    folder, asked = exported(tmp_path), []

    def snapshot_download(name, revision=None, **patterns):
        asked.append((name, revision))
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    bundle = m2jax.load("hf:openai/clip-vit-base-patch32@main")
    assert asked[0] == ("openai/clip-vit-base-patch32", "main")
    assert bundle.config.family == "clip"
    same_params(toy("clip").params, bundle.params)


@pytest.mark.parametrize("name", ["../x", "a/..", ".a/b", "a/b@../../x", "a/b@/x", "a", "a/b/c"])
def test_a_name_that_leaves_the_cache_never_reaches_the_hub(monkeypatch, name):
    hub = types.SimpleNamespace(snapshot_download=lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(m2jax.config.UserError, match="not the name of a repository"):
        m2jax.load(f"hf:{name}")


def test_a_model_is_laid_out_over_a_mesh(tmp_path):
    folder = exported(tmp_path)
    mesh = make_mesh(Mesh(data=1, fsdp=4, model=2))
    bundle = m2jax.load(folder, mesh=mesh)
    kernel = bundle.params["vision"]["stack"]["blocks"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 8, 24)
    same_params(toy("clip").params, bundle.params)


def test_weights_of_half_precision_stay_so(tmp_path):
    model = toy("clip")
    cfg = dataclasses.replace(model.config, param_dtype="float16")
    half = jax.tree.map(lambda x: x.astype(np.float16), model.params)
    outward.export(model._replace(config=cfg, params=half), tmp_path / "theirs", format="hf")
    bundle = m2jax.load(tmp_path / "theirs")
    same_params(half, bundle.params)
    assert bundle.config.param_dtype == "float16"
    pixels = inputs(cfg)[0]
    image = bundle.encode_image(pixels)
    assert image.dtype == np.float32
    scale = np.exp(np.float32(half["logit_scale"]))
    np.testing.assert_allclose(bundle.logits(image, image), scale * (image @ image.T), 1e-6)


def exported(tmp_path):
    outward.export(toy("clip"), tmp_path / "theirs", format="hf")
    return tmp_path / "theirs"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(capsys, *words):
    code = main(["convert", "import", *words])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    return error


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    folder, out = exported(tmp_path), str(tmp_path / "out")
    error = refused(capsys, str(folder), out, "--arch", "siglip")
    assert "these weights are clip: say --arch clip" in error
    assert "no.json" in refused(capsys, str(folder), out, "--arch", str(tmp_path / "no.json"))
    error = refused(capsys, str(folder), out, "--tokenizer", str(tmp_path))
    assert "holds no tokenizer" in error
    edit(folder / "preprocessor_config.json", crop_size={"height": 20, "width": 20})
    assert "gives images of 20 pixels, the model takes 22 x 22" in refused(capsys, str(folder), out)
    edit(folder / "preprocessor_config.json", crop_size=22, do_rescale=False)
    assert "do_rescale=False" in refused(capsys, str(folder), out)
    edit(folder / "preprocessor_config.json", do_rescale=True)
    edit(folder / "config.json", projection_dim=25)
    assert "visual_projection.weight" in refused(capsys, str(folder), out)
    edit(folder / "config.json", surprise=1)
    assert "surprise=1: unknown" in refused(capsys, str(folder), out)
    (folder / "config.json").unlink()
    assert "add --arch" in refused(capsys, str(folder), out)
    error = refused(capsys, str(folder), out, "--arch", "clip")
    assert "the weights alone do not tell the model" in error
    assert not (tmp_path / "out").exists()


def test_a_config_file_elsewhere_can_be_named(tmp_path):
    folder = exported(tmp_path)
    (folder / "config.json").rename(tmp_path / "clip.json")
    words = [str(folder / "model.safetensors"), str(tmp_path / "out"), "--arch"]
    assert main(["convert", "import", *words, str(tmp_path / "clip.json")]) == 0
    assert m2jax.load(tmp_path / "out").config.family == "clip"


def test_names_can_be_allowed_to_be_left_over_or_missing(tmp_path, capsys):
    folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert "left over vision_model.encoder.layers.2" in refused(capsys, str(folder), "x")
    allowed = ["--allow-missing", "vision_model.encoder.layers.2.*"]
    assert main(["convert", "import", str(folder), str(tmp_path / "out"), *allowed]) == 0
    assert m2jax.load(tmp_path / "out").config.vision.layers == 2


def test_formats_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="cn_clip cannot hold"):
        outward.export(toy("chinese-clip"), tmp_path / "x", format="open-clip")
    with pytest.raises(UserError, match="M2-Encoders alone"):
        outward.export(toy("clip"), tmp_path / "x", format="m2-torch")
    m2 = toy("clip")._replace(config=m2jax.load_config("emoji").model)
    for layout in ("hf", "open-clip"):
        with pytest.raises(UserError, match="use m2-torch"):
            outward.export(m2, tmp_path / "x", format=layout)
    assert not list(tmp_path.iterdir())
