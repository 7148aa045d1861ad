# SPDX-License-Identifier: Apache-2.0
"""One image with its captions, and the bytes that stand for it in an ArrayRecord file.

The bytes are a ``tf.train.Example`` with the features below, so TFDS reads the shards as a data set
of its own (``shards.write_metadata``). Fields are written in sorted order: equal records are equal
bytes. TensorFlow is not needed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_generated_pb2

from m2jax.config import UserError

# The module is filled at run time, so type checkers see nothing in it.
Example: Any = tf_example_generated_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
NO_SCORE = -2.0  # cosines lie between -1 and 1


@dataclass(frozen=True)
class Caption:
    """One text of an image."""

    text: str
    language: str = ""  # en, zh; "": not known yet
    score: float = NO_SCORE  # cosine with the image, by the scoring model
    original: str = ""  # what stood there before it was rewritten; "": it was not


@dataclass(frozen=True)
class Record:
    """One image, encoded as it was found, with its captions and where it is from."""

    key: str  # unique in a build: SOURCE/FILE#PLACE
    image: bytes
    captions: tuple[Caption, ...]
    source: str
    licence: str
    url: str = ""  # as the source says; "": it does not

    def with_captions(self, captions: tuple[Caption, ...]) -> Record:
        """The same image with other captions."""
        return dataclasses.replace(self, captions=captions)


@dataclass(frozen=True)
class Rejected:
    """What became of a record, caption or file that is not in the shards."""

    key: str
    reason: str  # a row of the manifest's counts
    detail: str = ""


def features() -> tfds.features.FeaturesDict:
    """The columns of the shards, as TFDS states them."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "key": text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Sequence(text()),
            "language": tfds.features.Sequence(text()),
            "score": tfds.features.Sequence(tfds.features.Scalar(dtype=np.float32)),
            "original": tfds.features.Sequence(text()),
            "source": text(),
            "licence": text(),
            "url": text(),
        }
    )


def encode(record: Record) -> bytes:
    """A record as bytes."""
    example = Example()
    fields = example.features.feature
    for name in ("key", "source", "licence", "url"):
        fields[name].bytes_list.value.append(getattr(record, name).encode())
    fields["image"].bytes_list.value.append(record.image)
    captions = record.captions
    fields["caption"].bytes_list.value.extend(c.text.encode() for c in captions)
    fields["language"].bytes_list.value.extend(c.language.encode() for c in captions)
    fields["original"].bytes_list.value.extend(c.original.encode() for c in captions)
    fields["score"].float_list.value.extend(c.score for c in captions)
    return example.SerializeToString(deterministic=True)


def decode(data: bytes, where: str) -> Record:
    """Inverse of ``encode``.

    Args:
        data: the bytes.
        where: what errors call them.

    Raises:
        UserError: the bytes are no record.
    """
    try:
        fields = Example.FromString(data).features.feature
        texts, languages, originals = (
            [value.decode() for value in fields[name].bytes_list.value]
            for name in ("caption", "language", "original")
        )
        scores = list(fields["score"].float_list.value)
        captions = tuple(map(Caption, texts, languages, scores, originals))
        if not len(texts) == len(languages) == len(scores) == len(originals):
            raise ValueError("its captions, languages and scores differ in number")
        (image,) = fields["image"].bytes_list.value
        one = {
            name: fields[name].bytes_list.value[0].decode()
            for name in ("key", "source", "licence", "url")
        }
    except (DecodeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: no record of built shards ({error}): build them again") from None
    return Record(image=image, captions=captions, **one)
