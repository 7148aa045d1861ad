# SPDX-License-Identifier: Apache-2.0
"""A run with a caption head writes what it learned, and says clearly when it cannot."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from m2jax import bundle as bundle_lib
from m2jax import config
from m2jax.captioner import can_write, load_captioner
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.eval import runner
from m2jax.eval.scenes import PatchEncoder
from m2jax.models.generate import Search
from m2jax.train import main
from tests.train import toy

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
WORDS = {"red": ("word1 word2", "word7"), "green": ("word3", "word8 word9"), "blue": ("word5",) * 2}


class ColourSource(toy.ToySource):
    """Three colours, each with its own text in two languages."""

    def batch(self, index, rows):
        batch = super().batch(index, rows)
        n = len(batch["image"])
        names = [list(COLOURS)[i % 3] for i in range(n)]
        tokens = [self.tokenizer(list(WORDS[name])) for name in names]
        batch["image"] = np.stack([np.full((2, 16, 16, 4), (*COLOURS[c], 255)) for c in names])
        batch["image"] = batch["image"].astype(np.uint8)
        batch["text"] = np.stack([t.ids for t in tokens])
        batch["text_mask"] = np.stack([t.mask for t in tokens])
        return batch


def trained(monkeypatch, folder, **caption):
    base = toy.experiment(monkeypatch, steps=60, log_every=60)
    monkeypatch.setitem(main_sources(), "toy", ColourSource)
    loss = config.Loss(caption=config.Caption(**{"weight": 2.0, "layers": 1, **caption}))
    cfg = dataclasses.replace(
        base,
        loss=loss,
        data=dataclasses.replace(base.data, augment=config.Augment()),
        optim=config.Optim(name="adamw", learning_rate=1e-2, warmup_steps=5),
        checkpoint=config.Checkpoint(every=60),
    )
    main.run(cfg, folder)
    return folder


def main_sources():
    from m2jax.data import loader

    return loader.SOURCES


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield trained(patch, tmp_path_factory.mktemp("captions"))


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_it_writes_the_texts_it_was_shown_in_each_language(workdir, method):
    write = load_captioner(workdir)
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS.values()]
    search = Search(method, length=write.longest, top_p=0.5)
    for place, language in enumerate(("en", "zh")):
        assert write(images, language=language, search=search) == [
            WORDS[name][place] for name in COLOURS
        ]


def test_what_it_cannot_do_is_said_in_one_line(workdir, tmp_path, monkeypatch):
    write = load_captioner(workdir)
    picture = [Image.new("RGB", (16, 16))]
    with pytest.raises(UserError, match="language 'fr': the model writes en, zh"):
        write(picture, language="fr")
    with pytest.raises(UserError, match="search 'best': no such method: use one of greedy"):
        write(picture, search=Search("best"))
    main.run(toy.experiment(monkeypatch, steps=1), tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain: has no caption head: train with loss\.caption"):
        load_captioner(tmp_path / "plain")
    assert runner.opened(tmp_path / "plain")[1] is None


def test_an_evaluation_is_given_what_writes_the_captions_of_its_model(workdir, tmp_path):
    model, writer = runner.opened(workdir)
    assert isinstance(writer, runner.Writer)
    assert isinstance(model, PatchEncoder)
    assert writer.languages == ("en", "zh")
    assert writer.bundle is model
    assert writer([Image.new("RGB", (16, 16), COLOURS["red"])], language="zh") == ["word7"]
    with pytest.raises(UserError, match="no such directory"):
        can_write("nowhere")


def test_a_model_elsewhere_writes_too(workdir, monkeypatch, tmp_path):
    """A captioner at an address is fetched once, and its captions are scored."""
    fetched = []
    monkeypatch.setattr(bundle_lib.hub, "download", lambda path: fetched.append(path) or workdir)
    model, writer = runner.opened("hf:owner/name")
    assert fetched == ["hf:owner/name"]
    assert writer is not None
    assert writer.bundle is model
    assert can_write("hf:owner/name")


def test_the_likelihood_is_that_of_the_words_it_writes(workdir):
    """Its own caption is the likeliest, and a probability: all one-word texts sum to below 1."""
    write = load_captioner(workdir)
    picture = [Image.new("RGB", (16, 16), COLOURS["red"])]
    texts = [f"word{i}" for i in range(1, 10)]
    found = write.log_likelihood(picture, texts, language="zh")
    assert texts[int(np.argmax(found))] == "word7"
    assert np.exp(found).sum() < 1 + 1e-5
    each = [write.log_likelihood(picture, [text], language="zh")[0] for text in texts]
    np.testing.assert_allclose(found, each, rtol=1e-4)
    with pytest.raises(UserError, match="language 'fr'"):
        write.log_likelihood(picture, texts, language="fr")


def test_devices_that_share_the_rows_write_and_rate_the_same(workdir):
    mesh = make_mesh(config.Mesh(fsdp=2), jax.devices()[:4])
    alone, shared = load_captioner(workdir), load_captioner(workdir, mesh=mesh)
    images = [Image.new("RGB", (16, 16), colour) for colour in COLOURS.values()]
    assert shared(images, language="zh") == alone(images, language="zh")
    texts = [WORDS[name][1] for name in COLOURS]
    for shown in (images, images[:1]):
        np.testing.assert_allclose(
            shared.log_likelihood(shown, texts, language="zh"),
            alone.log_likelihood(shown, texts, language="zh"),
            rtol=1e-4,
        )
