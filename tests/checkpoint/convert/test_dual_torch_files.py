# SPDX-License-Identifier: Apache-2.0
"""Files of the PyTorch libraries load here, and ours load there, with the same embeddings."""

import json

import numpy as np
import pytest

import m2jax
from m2jax.checkpoint.convert import open_clip_config, outward
from m2jax.checkpoint.convert.check import LIMIT
from m2jax.cli.main import main
from m2jax.config_dual import FAMILIES
from tests.checkpoint.convert import torch_toys
from tests.checkpoint.convert.torch_toys import END

pytestmark = pytest.mark.torch


def apart(bundle, wanted, probes):
    """The largest difference between our features of the probes and those wanted."""
    pixels, table, mask = probes
    ours = bundle.encode_image(pixels), bundle.encode_text(table, mask)
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, wanted, strict=True))


def probes(cfg):
    return torch_toys.pixels(cfg.vision.image_size), *torch_toys.ids(eos=END)


def saved_hf(family, folder):
    text = {"eos_token_id": END} if family == "clip" else {}
    model = torch_toys.hf(family, text=text)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_folder_loads_and_goes_back(tmp_path, family, pickled):
    import transformers

    model = saved_hf(family, tmp_path / "theirs")
    if pickled:
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch_toys.torch().save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    made = tmp_path / "ours"
    assert main(["convert", "import", str(tmp_path / "theirs"), str(made)]) == 0
    bundle = m2jax.load(made)
    given = probes(bundle.config)
    assert apart(bundle, torch_toys.hf_features(model, bundle.config, *given), given) < LIMIT
    outward.export(bundle, tmp_path / "back", format="hf")
    again, told = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()), told
    assert apart(bundle, torch_toys.hf_features(again.eval(), bundle.config, *given), given) < LIMIT
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").model_type


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_open_clip_folder_loads_and_goes_back(tmp_path, monkeypatch, kind):
    trunk = open_clip_config.Trunk(width=64, layers=3, heads=4, mlp_width=96)
    monkeypatch.setitem(open_clip_config.TRUNKS, "base", trunk)
    clip = torch_toys.open_clip_cfg(quick_gelu=True)
    model_cfg = clip if kind == "clip" else torch_toys.open_clip_siglip_cfg()
    model = torch_toys.open_clip(model_cfg)
    import open_clip

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    torch_toys.torch().save(model.state_dict(), theirs / "open_clip_pytorch_model.bin")
    bundle = m2jax.load(theirs)
    given = probes(bundle.config)
    wanted = torch_toys.features(model, bundle.config, given[0], given[1])
    assert apart(bundle, wanted, given) < LIMIT
    outward.export(bundle, tmp_path / "back", format="open-clip")
    again, steps = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'back'}")
    wanted = torch_toys.features(again.eval(), bundle.config, given[0], given[1])
    assert apart(bundle, wanted, given) < LIMIT
    picture = torch_toys.picture(61, 40)
    mean, std = np.array(bundle.config.vision.mean), np.array(bundle.config.vision.std)
    ours = (bundle.preprocess([picture])[0] - mean) / std
    np.testing.assert_allclose(steps(picture).numpy().transpose(1, 2, 0), ours, atol=1e-6)


def test_a_cn_clip_checkpoint_loads_and_goes_back(tmp_path):
    from safetensors.torch import load_file

    torch, model = torch_toys.torch(), torch_toys.cn_clip()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "clip_cn.pt")
    words = [str(tmp_path / "clip_cn.pt"), str(tmp_path / "ours"), "--arch", "chinese-clip"]
    assert main(["convert", "import", *words]) == 0
    bundle = m2jax.load(tmp_path / "ours")
    given = probes(bundle.config)
    wanted = torch_toys.features(model, bundle.config, given[0], given[1])
    assert apart(bundle, wanted, given) < LIMIT
    outward.export(bundle, tmp_path / "back", format="open-clip")
    again = torch_toys.cn_clip()
    again.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"))
    wanted = torch_toys.features(again, bundle.config, given[0], given[1])
    assert apart(bundle, wanted, given) < LIMIT


def test_cn_clip_and_transformers_hold_one_model(tmp_path):
    """The two layouts of a Chinese-CLIP are the same function: out in one, back in the other."""
    import transformers

    torch, model = torch_toys.torch(), torch_toys.cn_clip()
    torch.save(model.state_dict(), tmp_path / "clip_cn.pt")
    words = [str(tmp_path / "clip_cn.pt"), str(tmp_path / "ours"), "--arch", "chinese-clip"]
    assert main(["convert", "import", *words]) == 0
    out = [str(tmp_path / "ours"), str(tmp_path / "hf"), "--format", "hf"]
    assert main(["convert", "export", *out]) == 0
    other = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "hf").eval()
    cfg = m2jax.load(tmp_path / "ours").config
    given = probes(cfg)
    wanted = torch_toys.features(model, cfg, given[0], given[1])
    for a, b in zip(torch_toys.hf_features(other, cfg, *given), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=LIMIT)
