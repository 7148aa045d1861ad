# SPDX-License-Identifier: Apache-2.0
"""A trained model that writes about images, in each language it was trained in."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from m2jax import bundle as bundle_lib
from m2jax import config as config_lib
from m2jax.bundle import Bundle
from m2jax.checkpoint import manager
from m2jax.config import Experiment, Model, UserError
from m2jax.data.pairs import caption_languages
from m2jax.data.text import Speller
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules, gathered, replicated, spread
from m2jax.losses.language import linear_cross_entropy
from m2jax.models import generate, layers
from m2jax.models import params as params_lib
from m2jax.models.generate import Search
from m2jax.models.heads import Heads
from m2jax.models.params import Abstract, Params


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
        self._check_language(language)
        if search.method not in generate.METHODS:
            known = ", ".join(generate.METHODS)
            raise UserError(f"search {search.method!r}: no such method: use one of {known}")
        speller = self.bundle.tokenizer
        assert isinstance(speller, Speller)  # load_captioner saw to it
        ids = _write(
            (self.bundle.graph, self.graph),
            self.bundle.mesh,
            (search, speller.end, speller.vocab_size),
            (self.bundle.params, self.params),
            np.asarray(jax.random.key_data(jax.random.key(seed))),
            *self._placed(
                self.bundle.preprocess(images),
                np.full(len(images), self.languages.index(language)),
            ),
        )
        return [speller.decode(row) for row in np.asarray(ids)[: len(images)]]

    def log_likelihood(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, language: str = "en"
    ) -> Float[np.ndarray, " texts"]:
        """Log p(text | image) in nats, its end included: what ranks candidate answers.

        Args:
            images: PIL images, one per text, or one for all.
            texts: cut off where they are longer than the model's texts.
            language: one of ``languages``.

        Raises:
            UserError: a language the model was not trained in.
        """
        self._check_language(language)
        speller, tokens = self.bundle.tokenizer, self.bundle.tokenize(texts)
        assert speller is not None  # tokenize saw to it
        mesh, pixels = self.bundle.mesh, self.bundle.preprocess(images)
        if len(pixels) == 1 and mesh is not None:  # of all texts: every device has it
            pixels = jax.device_put(pixels, replicated(mesh))
        elif len(pixels) > 1:
            (pixels,) = self._placed(pixels)
        found = _rate(
            (self.bundle.graph, self.graph),
            mesh,
            speller.vocab_size,
            (self.bundle.params, self.params),
            pixels,
            *self._placed(
                np.full(len(texts), self.languages.index(language)), tokens.ids, tokens.mask
            ),
        )
        return np.asarray(found)[: len(texts)]

    def _placed(self, *inputs: np.ndarray) -> list[jax.Array]:
        """Rows where the parameters lie; see ``Bundle``."""
        return [spread(each, self.bundle.mesh) for each in inputs]

    def _check_language(self, language: str) -> None:
        if language not in self.languages:
            known = ", ".join(self.languages)
            raise UserError(f"language {language!r}: the model writes {known}: use one of them")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(graphs, mesh, how, params, seed, pixels, language) -> jax.Array:
    model, heads = (params_lib.bind(g, p) for g, p in zip(graphs, params, strict=True))
    search, end, vocab_size = how
    with gathered(mesh) as whole:
        written = generate.write(
            heads.caption,
            model.text_embed[...],
            model.encode_image(pixels).vl.tokens,
            language,
            search=search,
            end=end,
            vocab_size=vocab_size,
            rng=jax.random.wrap_key_data(seed),
        )
        return whole(written.ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rate(graphs, mesh, vocab_size, params, pixels, language, ids, mask) -> jax.Array:
    model, heads = (params_lib.bind(g, p) for g, p in zip(graphs, params, strict=True))

    def of_text(states: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        lost = linear_cross_entropy(
            states[None], table, ids[None], mask[None], vocab_size=vocab_size
        )
        return -lost * mask.sum()

    with gathered(mesh) as whole:
        table = model.text_embed[...]
        memory = model.encode_image(pixels).vl.tokens
        memory = jnp.broadcast_to(memory, (len(ids), *memory.shape[1:]))
        # As in training: what stands before a word predicts it, the first from the language's tag.
        words = layers.lookup(table, ids[:, 1:-1], model.dtype)
        states = heads.caption(words, language, memory)
        return whole(jax.vmap(of_text)(states, ids[:, 1:], mask[:, 1:].astype(jnp.float32)))


def can_write(path: str | os.PathLike[str]) -> bool:
    """Whether what ``m2jax.load`` takes is a run of ours whose model has a caption head.

    Raises:
        UserError: see ``m2jax.load``.
    """
    saved = bundle_lib.read_saved(path)
    experiment = saved.experiment if saved else None
    return experiment is not None and experiment.loss.caption.weight > 0


def load_captioner(
    path: str | os.PathLike[str], *, dtype: str = "float32", mesh: Mesh | None = None
) -> Captioner:
    """Loads a model that was trained with ``loss.caption.weight``.

    Args:
        path: a work directory or one checkpoint folder, here or as ``m2jax.load`` finds them
            elsewhere.
        dtype: precision of the computation.
        mesh: where the parameters are laid out by the usual rules; one device if not given.

    Raises:
        UserError: there is no such model, or it has no caption head or no tokenizer that spells.
    """
    directory = bundle_lib.local_directory(path)
    loaded = bundle_lib.load(directory, dtype=dtype, mesh=mesh)
    checkpoint, cfg = bundle_lib.checkpoint_of(directory), loaded.config
    experiment = manager.read_bundle(checkpoint).experiment if checkpoint else None
    if checkpoint is None or experiment is None or not isinstance(cfg, Model):
        raise UserError(f"{path}: no checkpoint of a training run: name its work directory")
    if not experiment.loss.caption.weight:
        raise UserError(f"{path}: has no caption head: train with loss.caption.weight above 0")
    if not isinstance(loaded.tokenizer, Speller):
        raise UserError(f"{path}: its tokenizer cannot turn ids into text: use GLM's or our own")
    heads = _heads(cfg, experiment)
    mesh = mesh or make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        heads.params,
        params_lib.shardings(heads, mesh, AxisRules()),
    )
    params = manager.read_params(checkpoint.absolute(), {"heads": shapes})
    return around(loaded, params, experiment)


def around(bundle: Bundle, params: Params, experiment: Experiment) -> Captioner:
    """A captioner of parameters that are here already, those of its heads under ``heads``."""
    assert isinstance(bundle.config, Model)  # no other family has heads
    graph = _heads(bundle.config, experiment).graph
    languages = caption_languages(experiment.data, experiment.loss.caption)
    return Captioner(bundle, graph, params["heads"], languages, bundle.config.max_text_len - 1)


def _heads(cfg: Model, experiment: Experiment) -> Abstract:
    languages = len(caption_languages(experiment.data, experiment.loss.caption))
    return params_lib.abstract_of(lambda rngs: Heads(rngs, cfg, experiment.loss, languages))
