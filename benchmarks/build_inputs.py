# SPDX-License-Identifier: Apache-2.0
"""Collections with planted faults, for benchmarks/build.py: what is in them is known to the record.

Scenes of two to four drawings of the emoji set (training and test styles) on a coloured ground,
with a sentence in English and one in Chinese that name them. Most are different from all others;
the rest is planted: copies, near copies (saved again, scaled, a word more), pictures of an
evaluation set, pairs that must stay (the same sentence on another picture, the same picture with
another sentence), and bad rows of 17 kinds. Five sources in five formats, always in the same order.
"""

import io

import build_formats
import numpy as np
from PIL import Image

from m2jax.data.emoji.dataset import load

SIDE = 96  # pixels of a scene
SHARES = {  # of all records, beside plain ones
    "exact": 0.05,
    "near": 0.10,
    "evaluation": 0.01,
    "same text": 0.01,
    "same image": 0.01,
    "bad": 0.08,
}
SOURCES = (("tars", 0.6), ("parquet", 0.2), ("tsv64", 0.1), ("lmdb", 0.05), ("coco", 0.05))

# Kind of bad row -> the reason it must be set aside with.
BAD = {
    "truncated": "undecodable image",
    "not an image": "undecodable image",
    "empty": "undecodable image",
    "bomb": "decompression bomb",
    "gif": "image format",
    "banner": "aspect ratio",
    "tiny": "image too small",
    "short text": "text too short",
    "german": "language",
    "no text": "no text",
    "invisible text": "no text",
}
BAD_OF_SOURCE = {
    "tars": {
        "no image": "missing image",
        "not utf-8": "text not UTF-8",
        "path outside": "path outside",
        "link": "link or device",
    },
    "parquet": {"no image": "missing image", "path outside": "path outside"},
    "tsv64": {"not base64": "damaged row"},
    "lmdb": {"pickle": "damaged row", "no image": "missing image"},
    "coco": {"no image": "missing image", "path outside": "path outside"},
}
GERMAN = "Ein kleiner Hund sitzt neben der roten Blume auf der Wiese und wartet auf seinen Freund"
LAYOUTS = (("beside", "旁边是"), ("above", "下面是"), ("below", "上面是"), ("far from", "远处是"))
COLOURS = {
    "red": ("红色", (200, 70, 60)),
    "green": ("绿色", (80, 160, 80)),
    "blue": ("蓝色", (80, 110, 200)),
    "yellow": ("黄色", (230, 210, 90)),
    "white": ("白色", (250, 250, 250)),
    "grey": ("灰色", (150, 150, 150)),
    "purple": ("紫色", (150, 90, 170)),
    "brown": ("棕色", (140, 100, 70)),
}


class Scenes:
    """Scenes by number."""

    def __init__(self, seed):
        self._seed, data = seed, load()
        self._names = [c.names for c in data.concepts]
        parts = [data.drawings(s) for s in ("train", "validation", "fluent", "openmoji")]
        self._concept = np.concatenate([p.concept for p in parts])
        self._images = np.concatenate([p.images for p in parts])

    def __call__(self, number, *, picture=None):
        """An RGB image and two sentences; the picture may be another number's."""
        drawn, english, chinese = self._scene(number)
        if picture is not None:
            drawn = self._scene(picture)[0]
        return drawn, english, chinese

    def _scene(self, number):
        rng = np.random.default_rng((self._seed, number))
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        word, rgb = COLOURS[colour]
        ground = tuple(int(c) for c in np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255))
        image = Image.new("RGB", (SIDE, SIDE), ground)
        english, chinese = [], []
        for _ in range(rng.integers(2, 5)):
            row = rng.integers(len(self._concept))
            side = int(rng.integers(28, 60))
            drawing = Image.fromarray(self._images[row], "RGBA").resize((side, side))
            x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
            image.paste(drawing, (x, y), drawing)
            names = self._names[self._concept[row]]
            english.append(names["en"])
            chinese.append(names["zh"])
        layout, words = LAYOUTS[rng.integers(len(LAYOUTS))]
        sentence = f" {layout} ".join(english) + f" on a {colour} ground"
        return image, sentence, f"{word}背景上有" + words.join(chinese)


def encoded(image, kind="JPEG", quality=92):
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, kind, quality=quality)
    return out.getvalue()


def again(image, rng):
    """An image as copies of it go round: scaled, saved again, a little brighter."""
    scale = rng.choice([0.5, 0.75, 1.0, 1.5, 2.0])
    side = round(SIDE * scale)
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    factor = rng.uniform(0.93, 1.07)
    image = image.point([min(255, round(v * factor)) for v in range(256)] * 3)
    if rng.random() < 0.2:
        return encoded(image, "WEBP", int(rng.integers(50, 95)))
    return encoded(image, "JPEG", int(rng.integers(35, 95)))


def edited(english, rng):
    """A sentence as copies of it go round."""
    choices = (
        english.upper(),
        english + ".",
        "a picture of " + english,
        english.replace(" on a", ", on a"),
        english + " (free)",
    )
    return choices[rng.integers(len(choices))]


def bomb():
    """A PNG of a few hundred kilobytes that says it has 20,000 x 20,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        sum32 = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum32

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


class Row:
    """One planted record."""

    def __init__(self, label, image, english, chinese, expected=""):
        self.label, self.image, self.english, self.chinese = label, image, english, chinese
        self.expected = expected  # the reason it must be set aside with; "": it must stay


def rows(count, seed, evaluation):
    """The records in order; ``evaluation`` scenes are numbered below zero (here: past 2**40)."""
    scenes, rng = Scenes(seed), np.random.default_rng(seed)
    labels, shares = ["plain", *SHARES], [1 - sum(SHARES.values()), *SHARES.values()]
    ends = np.cumsum([round(share * count) for _, share in SOURCES])
    plain = []  # numbers of plain records so far, of which copies are made
    before = ""
    for number in range(count):
        source = SOURCES[int(np.searchsorted(ends[:-1], number, side="right"))][0]
        if source in ("lmdb", "coco") and before != source:
            plain = []  # lmdb's pairs have one sentence: copies of two would be none
        before = source
        label = str(rng.choice(labels, p=shares)) if len(plain) > 20 else "plain"
        if label == "plain":
            image, english, chinese = scenes(number)
            plain.append(number)
            yield source, Row(label, encoded(image), english, chinese)
            continue
        other = plain[rng.integers(len(plain))]
        if label == "bad":
            yield source, _bad(source, scenes(number), rng)
        elif label == "evaluation":
            image, english, chinese = scenes(2**40 + int(rng.integers(evaluation)))
            _, english, chinese = scenes(number)
            yield source, Row(label, again(image, rng), english, chinese, "evaluation image")
        elif label == "exact":
            image, english, chinese = scenes(other)
            yield source, Row(label, encoded(image), english, chinese, "exact duplicate")
        elif label == "near":
            image, english, chinese = scenes(other)
            row = Row(label, again(image, rng), edited(english, rng), chinese, "near duplicate")
            yield source, row
        elif label == "same text":
            image, _, _ = scenes(number)
            _, english, chinese = scenes(other)
            yield source, Row(label, encoded(image), english, chinese)
        else:
            image, english, chinese = scenes(number, picture=other)
            yield source, Row(label, encoded(image), english, chinese)


def _bad(source, scene, rng):
    """A bad row of one of the kinds that the source can hold."""
    image, english, chinese = scene
    kinds = {**BAD, **BAD_OF_SOURCE[source]}
    kind = list(kinds)[rng.integers(len(kinds))]
    data = encoded(image)
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "not an image":
        data = b"<html><title>404 Not Found</title></html>"
    elif kind == "empty":
        data = b""
    elif kind == "bomb":
        data = bomb()
    elif kind == "gif":
        data = encoded(image, "GIF")
    elif kind == "banner":
        data = encoded(image.resize((400, 40)))
    elif kind == "tiny":
        data = encoded(image.resize((16, 20)))
    texts = {
        "short text": ("cat", "猫"),
        "german": (GERMAN, ""),
        "no text": ("", ""),
        "invisible text": ("\u200b\u200b \u2060", ""),
    }
    english, chinese = texts.get(kind, (english, chinese))
    return Row(f"bad: {kind}", data, english, chinese, kinds[kind])


def write(folder, count, *, seed=0, evaluation=200):
    """Writes the collections.

    Returns:
        The words for the command line, and the rows' label and expected reason by key.
    """
    folder.mkdir(parents=True)
    writers = {
        "tars": build_formats.Tars,
        "parquet": build_formats.Parquet,
        "tsv64": build_formats.Tsv64,
        "lmdb": build_formats.Lmdb,
        "coco": build_formats.Coco,
    }
    truth, writer, current = {}, None, ""
    for source, row in rows(count, seed, evaluation):
        if source != current:
            if writer:
                writer.close()
            writer, current = writers[source](folder / source), source
        truth[f"{source}/{writer.add(row)}"] = (row.label, row.expected)
    writer.close()
    scenes, tests = Scenes(seed), build_formats.Tars(folder / "evaluation")
    for number in range(evaluation):
        image, english, chinese = scenes(2**40 + number)
        tests.add(Row("test", encoded(image), english, chinese))
    tests.close()
    patterns = {
        "tars": "tars/*.tar",
        "parquet": "parquet/*.parquet",
        "tsv64": "tsv64/all_imgs.tsv",
        "lmdb": "lmdb/pairs_and_imgs",
        "coco": "coco/captions.json",
    }
    words = [w for k, p in patterns.items() for w in ("--source", f"{k}={k}:{folder / p}")]
    return [*words, "--evaluation", f"test=tars:{folder}/evaluation/*.tar"], truth
