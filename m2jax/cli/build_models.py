# SPDX-License-Identifier: Apache-2.0
"""The models of a build of shards: loaded in each worker, once, when its first piece asks.

Beam pickles these objects, so they hold names and no weights.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from m2jax.config import UserError


def check(model: str) -> None:
    """Refuses a model before hours of reading, without its parameters.

    Raises:
        UserError: nothing readable is there.
    """
    from m2jax import bundle

    try:
        bundle.read_saved(model)
    except UserError as error:
        raise UserError(f"--score-model {model}: {error}") from error


@dataclass(frozen=True)
class BundleScorer:
    """Cosines by a model of m2jax."""

    model: str  # whatever m2jax.load takes
    batch: int  # pairs at a time; fewer are filled up, so that one program is compiled

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Cosine of each image with the text beside it [n] float32."""
        bundle = _bundle(self.model)
        short = self.batch - len(images)
        pixels = bundle.preprocess([*images, *([images[-1]] * short)])
        tokens = bundle.tokenize([*texts, *([texts[-1]] * short)])
        image = np.asarray(bundle.encode_image(pixels), np.float32)
        text = np.asarray(bundle.encode_text(tokens.ids, tokens.mask), np.float32)
        return (image * text).sum(axis=-1)[: len(images)]


@dataclass(frozen=True)
class CaptionRewriter:
    """Captions by a run of m2jax that was trained with ``loss.caption.weight``."""

    model: str
    batch: int

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], languages: Sequence[str]
    ) -> list[str]:
        """A caption per image; "" in languages that the model does not write."""
        del texts  # our own model looks at the image alone
        captioner = _captioner(self.model)
        written = [""] * len(images)
        for language in captioner.languages:
            rows = [i for i, asked in enumerate(languages) if asked == language]
            for first in range(0, len(rows), self.batch):
                part = rows[first : first + self.batch]
                full = part + part[-1:] * (self.batch - len(part))
                found = captioner([images[i] for i in full], language=language)
                for row, text in zip(part, found, strict=False):
                    written[row] = text
        return written


@functools.cache
def _bundle(model: str) -> Any:
    from m2jax import bundle
    from m2jax.dist.host import load_devices

    load_devices()
    return bundle.load(model)


@functools.cache
def _captioner(model: str) -> Any:
    from m2jax.captioner import load_captioner
    from m2jax.dist.host import load_devices

    load_devices()
    return load_captioner(model)


@dataclass(frozen=True)
class Made:
    """Gives one of the above, where a factory is asked for."""

    what: Any

    def __call__(self) -> Any:
        """The scorer or rewriter."""
        return self.what


@dataclass(frozen=True)
class Named:
    """A captioner of one's own, as MODULE:NAME: a callable without arguments that makes it."""

    name: str

    def __call__(self) -> Any:
        """The captioner.

        Raises:
            UserError: see ``find``.
        """
        return self.find()()

    def find(self) -> Callable[[], Any]:
        """What makes it, of an installed module or of one in the working directory.

        Raises:
            UserError: there is no such module, or no such callable in it.
        """
        module, _, name = self.name.partition(":")
        if os.getcwd() not in sys.path:  # a console script has its own folder there instead
            sys.path.append(os.getcwd())
        try:
            made = getattr(importlib.import_module(module), name)
            if not callable(made):
                raise TypeError(f"{name} is no callable")
            return made
        except Exception as error:  # whatever a module does as it is imported
            raise UserError(f"--captioner {self.name}: {error}: mend MODULE:NAME") from error
