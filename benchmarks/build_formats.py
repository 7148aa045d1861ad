# SPDX-License-Identifier: Apache-2.0
"""Writes rows of benchmarks/build_inputs.py in the five formats that a build reads."""

import base64
import io
import json
import pickle
import tarfile

PER_TAR, PER_TABLE = 2_000, 5_000  # samples of a tar, rows of a table


class Tars:
    """img2dataset's tars, faults of archives included."""

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


class Parquet:
    """Tables with the bytes of the pictures."""

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


class Tsv64:
    """Chinese-CLIP's TSV of base64."""

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


class Lmdb:
    """Chinese-CLIP's LMDB."""

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


class Coco:
    """COCO's captions beside a folder of pictures."""

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
