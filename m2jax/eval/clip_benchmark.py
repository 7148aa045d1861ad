# SPDX-License-Identifier: Apache-2.0
"""Our models in CLIP_benchmark: what its ``load_clip`` returns, and its command with them in it.

    python -m m2jax.eval.clip_benchmark eval --model_type m2jax --model NAME --pretrained FOLDER

with ``--no_amp`` and whatever else its command takes.

``--pretrained`` is what ``m2jax.load`` takes and ``--model`` only names it in the results. Needs
``pip install clip-benchmark``. Features come out on the CPU whatever device it asks for; JAX keeps
its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from m2jax.bundle import load
from m2jax.config import UserError
from m2jax.data.text import Tokens
from m2jax.dist.mesh import local_mesh
from m2jax.eval.emoji import Encoder

MODEL_TYPE = "m2jax"


class Texts(NamedTuple):
    """Tokenised texts that move to a device as a tensor would."""

    tokens: Tokens

    def to(self, device: object) -> Texts:
        """Itself: JAX places what it is given."""
        return self


class Model:
    """An encoder of torch tensors, as CLIP_benchmark calls it."""

    def __init__(self, model: Encoder) -> None:
        self.encoder = model

    def encode_image(self, pixels: Any) -> Any:
        """Features of pixels as ``transform`` makes them, [b, h, w, 3]; a tensor of unit rows."""
        return _tensor(self.encoder.encode_image(np.asarray(pixels.cpu())))

    def encode_text(self, texts: Texts) -> Any:
        """Features of what ``tokenizer`` made; a tensor of unit rows."""
        return _tensor(self.encoder.encode_text(*texts.tokens))

    def eval(self) -> Model:
        """Itself: it never trains."""
        return self

    def to(self, device: object) -> Model:
        """Itself."""
        return self


class Loaded(NamedTuple):
    """CLIP_benchmark's contract: (model, transform, tokenizer)."""

    model: Model
    transform: Callable[[Image.Image], np.ndarray]  # collated into tensors by its data loader
    tokenizer: Callable[[Sequence[str]], Texts]


def load_clip(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str = "cpu"
) -> Loaded:
    """Loads a model as CLIP_benchmark's own loaders do.

    Args:
        model_name: ignored; names the model in its results.
        pretrained: what ``m2jax.load`` takes.
        cache_dir: ignored.
        device: ignored.

    Raises:
        UserError: see ``m2jax.load``.
    """
    return adapted(load(pretrained, mesh=local_mesh()))


def adapted(model: Encoder) -> Loaded:
    """An encoder in CLIP_benchmark's terms."""
    return Loaded(
        Model(model),
        lambda image: np.asarray(model.preprocess([image]))[0],
        lambda texts: Texts(Tokens(*map(np.asarray, model.tokenize(texts)))),
    )


def register() -> None:
    """Makes ``--model_type m2jax`` known to CLIP_benchmark.

    Its top-k accuracy takes ``float`` of an array of one number, which NumPy 2.4 and later refuse:
    the name ``float`` is given there its meaning of before.

    Raises:
        UserError: it is not installed.
    """
    try:
        import clip_benchmark.models as models  # pyright: ignore[reportMissingImports]
        from clip_benchmark.metrics import (  # pyright: ignore[reportMissingImports]
            zeroshot_classification,
        )
    except ImportError:
        raise UserError("clip_benchmark: not installed: pip install clip-benchmark") from None
    zeroshot_classification.float = lambda x: np.asarray(x).item()
    if MODEL_TYPE not in models.TYPE2FUNC:
        models.TYPE2FUNC[MODEL_TYPE] = load_clip
        models.MODEL_TYPES.append(MODEL_TYPE)  # the list its command line checks against


def _tensor(features: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(np.array(features, np.float32))


def main() -> int:
    """CLIP_benchmark's own command line."""
    try:
        register()
    except UserError as error:
        print(f"m2jax: error: {error}", file=sys.stderr)
        return 2
    import clip_benchmark.cli as cli  # pyright: ignore[reportMissingImports]

    return cli.main() or 0


if __name__ == "__main__":
    sys.exit(main())
