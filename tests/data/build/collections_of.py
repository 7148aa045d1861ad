# SPDX-License-Identifier: Apache-2.0
"""Small collections of every kind, for tests of the build."""

import base64
import io
import json
import pickle
import tarfile

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ENGLISH = "animal number {} stands beside the {} house in the morning"
CHINESE = "第{}只动物早上站在{}房子旁边"
WORDS = ("red", "tall", "wooden", "ruined", "painted", "narrow", "empty", "famous", "quiet")
COLOURS = ("红色", "高大", "木头", "破旧", "彩绘", "狭窄", "空空的", "著名", "安静")


def picture(number, side=48):
    """A picture of its own for each number: noise."""
    rng = np.random.default_rng(number)
    cells = rng.integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def english(number):
    return ENGLISH.format(number * 7919, WORDS[number % 9])


def chinese(number):
    return CHINESE.format(number * 7919, COLOURS[number % 9])


def write_tar(file, members):
    """A tar of (name, bytes) and of ready TarInfo objects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def sample(number, image=None):
    """Members of one img2dataset sample with both captions."""
    data = encoded(picture(number)) if image is None else image
    fields = {"caption": english(number), "zh": chinese(number), "url": f"u{number}", "key": "k"}
    return [
        (f"{number:05d}.png", data),
        (f"{number:05d}.txt", english(number).encode()),
        (f"{number:05d}.json", json.dumps(fields).encode()),
    ]


def tars(folder, numbers, per_tar=10):
    """Tars of samples; returns the files."""
    numbers = list(numbers)
    return tuple(
        write_tar(
            folder / f"{first:05d}.tar",
            [member for number in numbers[first : first + per_tar] for member in sample(number)],
        )
        for first in range(0, len(numbers), per_tar)
    )


def parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    return file


def tsv64(folder, images, texts):
    """(id, bytes) of images, and lines of texts as objects or raw bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "all_imgs.tsv").open("wb") as out:
        for number, data in images:
            out.write(str(number).encode() + b"\t" + base64.urlsafe_b64encode(data) + b"\n")
    with (folder / "all_texts.jsonl").open("wb") as out:
        for line in texts:
            out.write(line if isinstance(line, bytes) else json.dumps(line).encode())
            out.write(b"\n")
    return folder / "all_imgs.tsv"


def lmdb_pairs(folder, pairs, images):
    """Pairs as raw bytes or tuples, images by id."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pairs", "imgs"):
        with lmdb.open(str(folder / name), map_size=2**24) as opened, opened.begin(write=True) as t:
            if name == "pairs":
                for number, pair in enumerate(pairs):
                    raw = pair if isinstance(pair, bytes) else pickle.dumps(pair)
                    t.put(str(number).encode(), raw)
                t.put(b"num_samples", str(len(pairs)).encode())
            else:
                for key, data in images.items():
                    t.put(str(key).encode(), data)
    return folder
