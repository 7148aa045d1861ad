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
# # Zero-shot classification in two languages
#
# Takes the model that `make demo` left in `runs/demo`, or trains a small one for half a minute, and
# asks it in English and in Chinese what drawings show that no training batch held. The data set is
# built at first use.

# %%
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import m2jax
from m2jax.train.main import run

workdir = Path("../runs/demo")
if not (workdir / "checkpoints").is_dir():
    workdir = Path("../runs/notebook")  # the other notebooks take it from there, and leave it
    small = ["model.width=64", "model.heads=4", "model.backbone_layers=1", "model.vl_layers=1"]
    plain = [f"data.augment.{name}=0." for name in vars(m2jax.Experiment().data.augment)]
    short = ["train.steps=100", "train.log_every=25", "optim.warmup_steps=10", "eval.suite="]
    batch = ["data.batch_size=64", "data.views=1", "mesh.cpu_devices=0"]
    run(m2jax.load_config("emoji", [*small, *plain, *short, *batch]), workdir)

bundle = m2jax.load(workdir)
print(bundle.config.name, f"{sum(x.size for x in jax.tree.leaves(bundle.params)):,} parameters")

# %% [markdown]
# ## Pictures in a folder per class
#
# `fluent` is drawn by a vendor whose drawings are in no training batch. The classes are five of
# Unicode's groups of emoji; any folder of yours with a folder per class works the same way.

# %%
from m2jax.data.emoji import dataset

GROUPS = {1: "people", 3: "animals", 4: "food", 5: "places", 7: "objects"}
data = dataset.load()
fluent = data.drawings("fluent")
folder = Path(tempfile.mkdtemp())
for pixels, concept in zip(fluent.images, fluent.concept, strict=True):
    group = GROUPS.get(data.concepts[concept].group)
    if group:
        file = folder / group / f"{concept}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
print({path.name: len(list(path.iterdir())) for path in sorted(folder.iterdir())})

# %% [markdown]
# ## One suite, two languages
#
# Each class is asked for by an ensemble of prompts (`m2jax/eval/prompts.py`). English names come
# from the folders, Chinese ones from a file. On the shell:
# `m2jax eval --model runs/demo --suite zero-shot --data FOLDER --classes names.json --json a.json`

# %%
from m2jax.eval import figures, prompts, suites, tables
from m2jax.eval.sets.names import read_classes
from m2jax.eval.sets.records import Place

chinese = {"animals": "动物", "food": "食物", "objects": "物品", "people": "人物", "places": "地点"}
english = {name: name for name in chinese}
names_file = folder.parent / f"{folder.name}.json"
names_file.write_text(json.dumps({"en": english, "zh": chinese}), encoding="utf-8")

place = Place(folder, names=read_classes(names_file))
request = suites.Request("emoji-groups", place)
scored = suites.score(bundle, "zero-shot", request)
print(tables.table(figures.flat(scored.figures)))

# %% [markdown]
# A figure without its interval says little: with this many pictures a point or two is chance. Which
# differences between two models are real is a question for `m2jax compare A.json B.json`, which
# compares them picture by picture.

# %%
from m2jax.eval import compare

plain = suites.score(
    bundle, "zero-shot", suites.Request("emoji-groups", place, templates=prompts.PLAIN)
)
a, b = (
    compare.Saved(figures.flat(s.figures), figures.examples(s.figures), s.questions)
    for s in (plain, scored)
)
print("A: the bare name, B: the ensemble")
print(compare.table(compare.compare(a, b, resamples=2000)))


# %% [markdown]
# ## Your own labels, in both languages at once


# %%
def label(image, names):
    tokens = bundle.tokenize(names)
    logits = bundle.logits(
        bundle.encode_image(bundle.preprocess([image])), bundle.encode_text(tokens.ids, tokens.mask)
    )
    shares = jax.nn.softmax(logits[0])
    return {name: round(float(share), 3) for name, share in zip(names, shares, strict=True)}


image = Image.fromarray(fluent.images[np.flatnonzero(data.is_seen(fluent))[100]])
image

# %%
label(image, ["a cat", "一只猫", "an apple", "苹果", "a house", "房子"])
