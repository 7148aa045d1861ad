# SPDX-License-Identifier: Apache-2.0
"""A toy model in a folder, for the verb's tests, and one that only tokenizes."""

import jax
import numpy as np
import pytest
import sentencepiece  # noqa: F401  (its C++ types warn when first imported inside a test)

from m2jax.checkpoint import folder
from m2jax.config import Model, resolve
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.models import params as params_lib
from m2jax.tasks.labels import grammar, vocabulary

MODEL = resolve(
    Model(
        **{"width": 16, "heads": 2, "out_dim": 8, "vocab_size": 140, "text_positions": 34},
        **{"image_size": 16, "max_text_len": 32, "dtype": "float32", "init": "scaled"},
    )
)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Random weights: what is shown is that files become labels, not that they are right."""
    words = vocabulary.checked(
        [{"en": [a], "zh": [b]} for a, b in (("red", "红"), ("green", "绿"), ("blue", "蓝"))]
    )
    lines = [s.text for s in grammar.sentences(words, ("en", "zh"), 300, seed=9)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(lines, 130), 32)
    params = jax.jit(lambda: params_lib.initialise(MODEL, jax.random.key(0)))()
    path = tmp_path_factory.mktemp("models") / "toy"
    folder.write(
        path, MODEL, params, tokenizer=tokenizer.to_dict(), preprocess=Preprocess(16).to_dict()
    )
    return path


class FourWords:
    """A tokenizer of four words; longer texts lose their end."""

    def tokenize(self, texts):
        ids = np.zeros((len(texts), 4), np.int64)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[:4]):
                ids[row, place] = hash(word)
        return ids, ids != 0


@pytest.fixture
def four_words():
    return FourWords()
