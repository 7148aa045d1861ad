# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convert weights, and know that they are right
#
# `m2jax convert import` reads the official M2-Encoder checkpoints and the CLIP family in
# their usual layouts. Here a model of ours goes out under the official names and comes back, so no
# download is needed; the calls for published weights are the same.

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import m2jax
from m2jax.checkpoint.convert import check

# %%
from m2jax.train.main import run

workdir = Path("../runs/demo")
if not (workdir / "checkpoints").is_dir():
    workdir = Path("../runs/notebook")
    small = ["model.width=64", "model.heads=4", "model.backbone_layers=1", "model.vl_layers=1"]
    plain = [f"data.augment.{name}=0." for name in vars(m2jax.Experiment().data.augment)]
    short = ["train.steps=100", "train.log_every=25", "optim.warmup_steps=10", "eval.suite="]
    batch = ["data.batch_size=64", "data.views=1", "mesh.cpu_devices=0"]
    run(m2jax.load_config("emoji", [*small, *plain, *short, *batch]), workdir)
bundle = m2jax.load(workdir)

# %% [markdown]
# ## Out, under the official names
#
# `m2-torch` writes what the authors' code loads; `hf` and `open-clip` do it for the CLIP family.

# %%
folder = Path(tempfile.mkdtemp())
m2jax.export(bundle, folder / "official", format="m2-torch")
print(sorted(path.name for path in (folder / "official").iterdir()))

# %% [markdown]
# ## And back, checked
#
# Every import is compared with an independent forward pass in NumPy that reads the source file
# under its own names and shares no code with the model. Past the tolerance nothing is written.

# %%
report = m2jax.convert(folder / "official", folder / "back")
print(check.table(report.checks))

# %%
back = m2jax.load(folder / "back")
tokens = bundle.tokenize(["a red apple", "一只猫"])
pixels = bundle.preprocess([Image.new("RGB", (64, 48), "crimson")])
for one, other in (
    (bundle.encode_text(tokens.ids, tokens.mask), back.encode_text(tokens.ids, tokens.mask)),
    (bundle.encode_image(pixels), back.encode_image(pixels)),
):
    np.testing.assert_array_equal(one, other)
print("features are the same to the last bit")

# %% [markdown]
# ## What is wrong is said, in one line
#
# A weight that is missing, one that fits nowhere, and a damaged file: each is refused by name, and
# the destination does not exist afterwards.

# %%
import safetensors.numpy

weights = safetensors.numpy.load_file(folder / "official" / "model.safetensors")
config = (folder / "official" / "config.json").read_bytes()


def attempt(name, content):
    source = folder / name
    source.mkdir()
    (source / "config.json").write_bytes(config)
    (source / "model.safetensors").write_bytes(content)
    try:
        m2jax.convert(source, folder / f"{name}-imported")
    except m2jax.UserError as error:
        print(f"{name}: {str(error).replace(str(folder), '')[:150]}")
    assert not (folder / f"{name}-imported").exists()


some = next(name for name in weights if name.endswith("k_proj.A.weight"))
less = {name: value for name, value in weights.items() if name != some}
attempt("missing", safetensors.numpy.save(less))
attempt("left-over", safetensors.numpy.save({**weights, "extra.weight": np.zeros(3)}))
attempt("cut", safetensors.numpy.save(weights)[:-100])

# %% [markdown]
# On the shell, with a release's file:
#
# `m2jax convert import m2_encoder_1B.ckpt models/m2-1b --arch m2-encoder-1b --tokenizer release/`
