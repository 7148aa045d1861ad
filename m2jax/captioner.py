# SPDX-License-Identifier: Apache-2.0
"""A trained model that writes about images, in each language it was trained in."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

from m2jax import bundle as bundle_lib
from m2jax.bundle import Bundle
from m2jax.checkpoint import manager
from m2jax.config import Mesh, Model, UserError
from m2jax.data.text import Speller
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.models import generate
from m2jax.models import params as params_lib
from m2jax.models.generate import Search
from m2jax.models.heads import Heads
from m2jax.models.params import Params


@dataclass(frozen=True)
class Captioner:
    """A bundle with its caption head."""

    bundle: Bundle
    graph: nnx.GraphDef  # of the heads
    params: Params  # of the heads
    languages: tuple[str, ...]
    longest: int  # words of a text in training, its end included

    def __call__(
        self,
        images: Sequence[Image.Image],
        *,
        language: str = "en",
        search: Search | None = None,
        seed: int = 0,
    ) -> list[str]:
        """One caption per image.

        Args:
            images: PIL images.
            language: one of ``languages``.
            search: how words are chosen; greedy if not given.
            seed: of nucleus sampling.

        Raises:
            UserError: a language the model was not trained in, a search that does not exist.
        """
        search = search or Search(length=self.longest)
        if language not in self.languages:
            known = ", ".join(self.languages)
            raise UserError(f"language {language!r}: the model writes {known}: use one of them")
        if search.method not in generate.METHODS:
            known = ", ".join(generate.METHODS)
            raise UserError(f"search {search.method!r}: no such method: use one of {known}")
        speller = self.bundle.tokenizer
        assert isinstance(speller, Speller)  # load_captioner saw to it
        written = _write(
            (self.bundle.graph, self.graph),
            (self.bundle.params, self.params),
            jnp.asarray(self.bundle.preprocess(images)),
            jnp.full(len(images), self.languages.index(language)),
            jax.random.key(seed),
            search,
            speller.end,
            speller.vocab_size,
        )
        return [speller.decode(row) for row in jax.device_get(written.ids)]


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _write(graphs, params, pixels, language, rng, search, end, vocab_size) -> generate.Written:
    model, heads = (params_lib.bind(g, p) for g, p in zip(graphs, params, strict=True))
    return generate.write(
        heads.caption,
        model.text_embed[...],
        model.encode_image(pixels).vl.tokens,
        language,
        search=search,
        end=end,
        vocab_size=vocab_size,
        rng=rng,
    )


def can_write(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run of ours whose model has a caption head."""
    directory = Path(path)
    checkpoint = bundle_lib.checkpoint_of(directory) if directory.is_dir() else None
    experiment = manager.read_bundle(checkpoint).experiment if checkpoint else None
    return experiment is not None and experiment.loss.caption.weight > 0


def load_captioner(path: str | os.PathLike[str], *, dtype: str = "float32") -> Captioner:
    """Loads a model that was trained with ``loss.caption.weight``.

    Args:
        path: a work directory or one checkpoint folder.
        dtype: precision of the computation.

    Raises:
        UserError: there is no such model, or it has no caption head or no tokenizer that spells.
    """
    loaded = bundle_lib.load(path, dtype=dtype)
    checkpoint, cfg = bundle_lib.checkpoint_of(Path(path)), loaded.config
    experiment = manager.read_bundle(checkpoint).experiment if checkpoint else None
    if checkpoint is None or experiment is None or not isinstance(cfg, Model):
        raise UserError(f"{path}: no checkpoint of a training run: name its work directory")
    if not experiment.loss.caption.weight:
        raise UserError(f"{path}: has no caption head: train with loss.caption.weight above 0")
    if not isinstance(loaded.tokenizer, Speller):
        raise UserError(f"{path}: its tokenizer cannot turn ids into text: use GLM's or our own")
    languages = experiment.data.languages
    heads = params_lib.abstract_of(lambda rngs: Heads(rngs, cfg, experiment.loss, len(languages)))
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        heads.params,
        params_lib.shardings(heads, mesh, AxisRules()),
    )
    params = manager.read_params(checkpoint.absolute(), {"heads": shapes})["heads"]
    return Captioner(loaded, heads.graph, params, languages, cfg.max_text_len - 1)
