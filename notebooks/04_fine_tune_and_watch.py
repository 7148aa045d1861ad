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
# # Fine-tune on your own folder, and watch
#
# Sixty-four pictures with a line of text in each language, listed in one TSV file; a run that
# starts from a trained model; its figures as it goes; and the model that comes out, saved and
# loaded again.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import m2jax
from m2jax.train.main import run

workdir = Path("../runs/demo")
if not (workdir / "checkpoints").is_dir():
    workdir = Path("../runs/notebook")
    small = ["model.width=64", "model.heads=4", "model.backbone_layers=1", "model.vl_layers=1"]
    plain = [f"data.augment.{name}=0." for name in vars(m2jax.Experiment().data.augment)]
    short = ["train.steps=100", "train.log_every=25", "optim.warmup_steps=10", "eval.suite="]
    batch = ["data.batch_size=64", "data.views=1", "mesh.cpu_devices=0"]
    run(m2jax.load_config("emoji", [*small, *plain, *short, *batch]), workdir)

# %% [markdown]
# ## The folder
#
# A first line that names the columns, then a path and its texts per line. Tars as webdataset writes
# them (`data.name=tars`) and mixtures of both work too.

# %%
from m2jax.data.emoji import dataset

data = dataset.load()
drawings = data.drawings("openmoji")
drawings = drawings.where(np.flatnonzero(data.is_seen(drawings))[10::20][:64])
folder = Path(tempfile.mkdtemp())
lines = ["path\ten\tzh"]
for pixels, number in zip(drawings.images, drawings.concept, strict=True):
    names = data.concepts[number].names
    Image.fromarray(pixels).save(folder / f"{number}.png")
    lines.append(f"{number}.png\t{names['en']}\t{names['zh']}")
(folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
print(*lines[:4], sep="\n")

# %% [markdown]
# ## The run
#
# The same trainer as ever: checkpoints, resuming, logs. On the shell:
# `m2jax train --config emoji --init runs/demo --workdir runs/mine --config.data.name=tsv ...`

# %%
settings = [
    f"finetune.init={workdir}",
    "data.name=tsv",
    f"data.files=('{folder}/pairs.tsv',)",
    *("data.batch_size=32", "data.views=1", "mesh.cpu_devices=0", "eval.suite="),
    *("optim.name=adamw", "optim.learning_rate=2e-3", "optim.weight_decay=0.1"),
    *("optim.warmup_steps=4", "train.steps=40", "train.log_every=4"),
    *(f"data.augment.{name}=0." for name in vars(m2jax.Experiment().data.augment)),
]
mine = folder / "mine"
code = run(m2jax.load_config("emoji", settings), mine)

# %% [markdown]
# ## Watch
#
# Every logged step is a line of `metrics.jsonl`; TensorBoard reads `mine/tensorboard`, and
# `log.wandb` sends the same figures to Weights & Biases.

# %%
from IPython.display import SVG

rows = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
steps, losses = ([row[key] for row in rows] for key in ("step", "loss"))
top, last = max(losses), max(steps)
points = " ".join(
    f"{10 + 380 * s / last:.0f},{110 - 100 * v / top:.0f}"
    for s, v in zip(steps, losses, strict=True)
)
SVG(
    '<svg xmlns="http://www.w3.org/2000/svg" width="400" height="120">'
    f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="2"/></svg>'
)

# %%
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0]

# %% [markdown]
# ## What it learned, and that it is what was saved

# %%
from m2jax.eval import features, retrieval
from m2jax.eval.sets.records import Files

pictures = Files([folder / line.split("\t")[0] for line in lines[1:]])
for path in (workdir, mine):
    model = m2jax.load(path)
    images = features.image_features(model, pictures, batch=64)
    for column, language in enumerate(("en", "zh"), 1):
        names = [line.split("\t")[column] for line in lines[1:]]
        unique, rows = features.unique_text_features(model, names, batch=64)
        answers = retrieval.standard([[name] for name in names])
        recall = retrieval.score(images, unique[rows], answers)["mean_recall"].share
        print(
            f"{path.name:9} {language}: mean recall {recall.value:.2f} "
            f"({recall.low:.2f} - {recall.high:.2f})"
        )

# %%
m2jax.export(model, folder / "exported", format="m2-torch")
again = m2jax.load(folder / "exported")
np.testing.assert_array_equal(features.image_features(again, pictures, batch=64), images)
print("exported and loaded: the same features")
