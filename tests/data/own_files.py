# SPDX-License-Identifier: Apache-2.0
"""Small data sets as users bring them, for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from m2jax import config
from m2jax.data.image import Preprocess
from m2jax.data.pairs import PairBatches
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer

SIZE = 16
TOKENIZER = SentencePieceTokenizer(train_tokenizer([f"thing {i} 东西" for i in range(40)], 80), 8)


def picture(number):
    """A flat colour that tells the number."""
    return Image.new("RGB", (20, 24), (number % 256, 7 * number % 256, 100))


def write_tsv(folder, count, first=0, header="path\ten\tzh"):
    """``count`` PNG files and the TSV that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header]
    for number in range(first, first + count):
        picture(number).save(folder / f"{number}.png")
        lines.append(f"{number}.png\tthing {number}\t东西 {number}")
    (folder / "data.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "data.tsv"


def encoded(number, kind="png"):
    out = io.BytesIO()
    picture(number).save(out, kind)
    return out.getvalue()


def write_tar(file, members):
    """A tar of (name, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def sample(number, **texts):
    """The members of one sample; its texts as json."""
    texts = texts or {"en": f"thing {number}", "zh": f"东西 {number}"}
    return [
        (f"{number:04d}.png", encoded(number)),
        (f"{number:04d}.json", json.dumps(texts).encode()),
    ]


def batches(sources, cfg=None, weights=None, seed=0, tags=()):
    """Batches of 8 over sources by name."""
    cfg = cfg or config.Data(batch_size=8)
    return PairBatches(
        sources,
        weights or [1.0] * len(sources),
        cfg,
        tokenizer=TOKENIZER,
        preprocess=Preprocess(SIZE, "white"),
        seed=seed,
        tags=tags,
    )


def number_of(image):
    """Which ``picture`` a row of a batch shows."""
    return int(np.asarray(image).reshape(-1, image.shape[-1])[0, 0])
