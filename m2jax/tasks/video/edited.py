# SPDX-License-Identifier: Apache-2.0
"""Labelled pairs made of clips: edited queries and the videos they took from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from m2jax.config import UserError
from m2jax.tasks.video import decode, encode, simulate
from m2jax.tasks.video.examples import Corpus
from m2jax.tasks.video.features import Encoder
from m2jax.tasks.video.simulate import Frames

HOST = 64  # frames of a query that are nobody's copy, at most
MOST_VIDEOS, MOST_FRAMES = 48, 256  # that are held at once; more would not fit into memory
GOOD = 23  # constant rate factor of queries that are not to be re-encoded badly

# Gives features of the frames of a query that is to be encoded with a factor (0: as it is).
Encode = Callable[[Frames, int], Float[np.ndarray, "frames dim"]]


def corpus(
    clips: Mapping[str, Frames],
    features: Encode,
    *,
    kinds: Sequence[str],
    count: int,
    rng: np.random.Generator,
) -> Corpus:
    """Edited queries, each with two copies, paired with all clips but their host.

    Args:
        clips: videos by name, of one size.
        features: of frames.
        kinds: of edits; each query has one or two of them.
        count: of queries.
        rng: decides everything.

    Raises:
        UserError: fewer than three clips, or one too short to be cut.
    """
    names = sorted(clips)
    if len(names) < 3:
        raise UserError(f"videos: {len(names)}: edited queries need three and more: add some")
    known = {name: features(clips[name], 0) for name in names}
    pairs: list[tuple[str, str]] = []
    boxes: list[list[list[int]]] = []
    for number in range(count):
        host, *copied = rng.choice(names, 3, replace=False).tolist()
        chosen = rng.choice(kinds, int(rng.integers(1, 1 + min(2, len(kinds)))), replace=False)
        start = int(rng.integers(0, max(1, len(clips[host]) - HOST + 1)))
        piece = clips[host][start : start + HOST]
        made = simulate.simulate(piece, {n: clips[n] for n in copied}, chosen.tolist(), rng)
        query = f"edited {number}"
        known[query] = features(made.frames, made.reencode)
        references = [name for name in names if name != host]
        pairs += [(query, name) for name in references]
        boxes += simulate.labels(query, made, references).values()
    return Corpus(known, pairs, boxes)


def of_videos(
    encoder: Encoder,
    videos: Mapping[str, Path],
    *,
    rate: float,
    count: int,
    seed: int,
    say: Callable[[str], None],
) -> Corpus:
    """Edited queries of video files, encoded and decoded again, and the features of all.

    Args:
        encoder: the model.
        videos: files by name; of more than 48, some at random.
        rate: frames per second; of a video its first 256 frames are used.
        count: of queries.
        seed: of all choices.
        say: gets a line per video that is left out.

    Raises:
        UserError: fewer than three videos can be read and are long enough.
    """
    rng = np.random.default_rng(seed)
    names = sorted(videos)
    clips: dict[str, Frames] = {}
    for name in (names[n] for n in rng.permutation(len(names))):
        if len(clips) == MOST_VIDEOS:
            break
        frames = []
        try:
            for image in decode.frames(videos[name], rate):
                frames.append(np.asarray(encoder.bundle.preprocessing.square(image)))
                if len(frames) == MOST_FRAMES:
                    break
        except UserError as error:
            say(f"left out: {error}")
            continue
        if len(frames) < 2 * simulate.SHORTEST:
            say(f"left out: {videos[name]}: {len(frames)} frames are too few to be cut")
            continue
        clips[name] = np.stack(frames)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "query.mp4"

        def features(frames: Frames, factor: int) -> np.ndarray:
            encode.write(file, frames, rate, factor=factor or GOOD)
            found = encoder.video(file, rate)
            if len(found) != len(frames):
                raise UserError(
                    f"rate {rate:g}: {len(frames)} frames became {len(found)} when encoded: "
                    "choose a whole number of frames per second"
                )
            return found

        return corpus(clips, features, kinds=simulate.KINDS, count=count, rng=rng)
