# SPDX-License-Identifier: Apache-2.0
"""Collections with planted faults, for benchmarks/build.py: what is in them is known to the record.

Scenes of two to four drawings of the emoji set (training and test styles) on a coloured ground,
with a sentence in English and one in Chinese that name them. Most are different from all others;
the rest is planted: copies, near copies (saved again, scaled, a word more), pictures of an
evaluation set, pairs that must stay (the same sentence on another picture, the same picture with
another sentence), and bad rows of 17 kinds. Five sources in five formats, always in the same order.
"""

import base64
import io
import json
import pickle
import tarfile

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
PER_TAR, PER_TABLE = 2_000, 5_000

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
    writers = {"tars": _Tars, "parquet": _Parquet, "tsv64": _Tsv64, "lmdb": _Lmdb, "coco": _Coco}
    truth, writer, current = {}, None, ""
    for source, row in rows(count, seed, evaluation):
        if source != current:
            if writer:
                writer.close()
            writer, current = writers[source](folder / source), source
        truth[f"{source}/{writer.add(row)}"] = (row.label, row.expected)
    writer.close()
    scenes, tests = Scenes(seed), _Tars(folder / "evaluation")
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


class _Tars:
    def __init__(self, folder):
        folder.mkdir()
        self._folder, self._count, self._tar = folder, 0, None

    def add(self, row):
        """Adds a row; returns its key."""
        if self._count % PER_TAR == 0:
            self.close()
            self._name = f"{self._count // PER_TAR:05d}.tar"
            self._tar = tarfile.open(self._folder / self._name, "w")
        key = f"{self._count:07d}"
        self._count += 1
        english = b"caf\xe9 au lait" if row.label == "bad: not utf-8" else row.english.encode()
        if row.label == "bad: path outside":
            self._member(f"../../{key}.jpg", row.image)
            return f"{self._name}#../../{key}.jpg"
        if row.label == "bad: link":
            info = tarfile.TarInfo(f"{key}.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            self._tar.addfile(info)
            return f"{self._name}#{key}.jpg"
        if row.label != "bad: no image":
            self._member(f"{key}.jpg", row.image)
        if english:
            self._member(f"{key}.txt", english)
        if row.chinese and row.label != "bad: not utf-8":
            text = json.dumps({"zh": row.chinese, "url": f"https://example.org/{key}"})
            self._member(f"{key}.json", text.encode())
        return f"{self._name}#{key}"

    def _member(self, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self):
        """Closes the tar."""
        if self._tar:
            self._tar.close()


class _Parquet:
    def __init__(self, folder):
        folder.mkdir()
        self._folder, self._rows, self._files = folder, [], 0

    def add(self, row):
        """Adds a row; returns its key."""
        path = {"bad: path outside": "../../../etc/passwd", "bad: no image": "nowhere.jpg"}
        columns = {
            "jpg": None if row.label in path else row.image,
            "path": path.get(row.label),
            "caption": row.english,
            "zh": row.chinese,
        }
        self._rows.append(columns)
        key = f"{self._files:05d}.parquet#0.{len(self._rows) - 1}"
        if len(self._rows) == PER_TABLE:
            self.close()
        return key

    def close(self):
        """Writes a file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._rows:
            pq.write_table(
                pa.Table.from_pylist(self._rows), self._folder / f"{self._files:05d}.parquet"
            )
            self._files += 1
        self._rows = []


class _Tsv64:
    def __init__(self, folder):
        folder.mkdir()
        self._images = (folder / "all_imgs.tsv").open("wb")
        self._texts = (folder / "all_texts.jsonl").open("w", encoding="utf-8")
        self._count = 0

    def add(self, row):
        """Adds a row; returns its key."""
        number = self._count
        self._count += 1
        data = base64.urlsafe_b64encode(row.image)
        if row.label == "bad: not base64":
            data = b"!!" + data[:-1]
        self._images.write(b"%d\t%s\n" % (number, data))
        for text in filter(None, (row.english, row.chinese)):
            line = {"text_id": number, "text": text, "image_ids": [number]}
            self._texts.write(json.dumps(line, ensure_ascii=False) + "\n")
        return f"all_imgs.tsv#{number}"

    def close(self):
        """Closes both files."""
        self._images.close()
        self._texts.close()


class _Lmdb:
    def __init__(self, folder):
        import lmdb

        folder = folder / "pairs_and_imgs"
        folder.mkdir(parents=True)
        self._pairs, self._images = (
            lmdb.open(str(folder / name), map_size=2**32) for name in ("pairs", "imgs")
        )
        self._count = 0

    def add(self, row):
        """Adds a row, with its English text alone; returns its key."""
        number = str(self._count).encode()
        text = "猫" if row.label == "bad: short text" else row.english
        pair = pickle.dumps((self._count, self._count, text))
        if row.label == "bad: pickle":
            pair = b"cos\nsystem\n(S'true'\ntR."
        with self._pairs.begin(write=True) as rows:
            rows.put(number, pair)
        if row.label != "bad: no image":
            with self._images.begin(write=True) as files:
                files.put(number, base64.urlsafe_b64encode(row.image))
        self._count += 1
        return f"pairs_and_imgs#{self._count - 1}"

    def close(self):
        """Closes both."""
        with self._pairs.begin(write=True) as rows:
            rows.put(b"num_samples", str(self._count).encode())
        self._pairs.close()
        self._images.close()


class _Coco:
    def __init__(self, folder):
        (folder / "images").mkdir(parents=True)
        self._folder, self._images, self._annotations = folder, [], []

    def add(self, row):
        """Adds a row; returns its key."""
        number = len(self._images)
        name = f"{number:07d}.jpg"
        if row.label == "bad: path outside":
            name = "../../../../etc/passwd"
        elif row.label != "bad: no image":
            (self._folder / "images" / name).write_bytes(row.image)
        self._images.append({"id": number, "file_name": name})
        for text in filter(None, (row.english, row.chinese)):
            self._annotations.append({"image_id": number, "caption": text})
        return f"captions.json#{number}"

    def close(self):
        """Writes the file."""
        found = {"images": self._images, "annotations": self._annotations}
        (self._folder / "captions.json").write_text(json.dumps(found, ensure_ascii=False))
