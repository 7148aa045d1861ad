# SPDX-License-Identifier: Apache-2.0
"""A library of videos that can be searched: a folder with features, their index, and what it is of.

    library.json      model, frames per second, videos with their marks and frames
    features/*.npy    of each video [frames, dim]; of its keyframes, where they alone are stored,
                      and which those are in *.kept.npy beside
    keyframes/        what chose them (see ``saved``)
    frames.db         milvus-lite's file, where no cluster is named and the index is no scan
    skipped.jsonl     videos that could not be read, and why

Indexing goes on where it was stopped: features that are there are not made again, and what is not
in the index yet is put there. Other models' features are refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32

from m2jax.config import UserError
from m2jax.tasks.video import arrays, features, keyframes, saved, scan
from m2jax.tasks.video.features import Encoder, Identity
from m2jax.tasks.video.pattern import Keyframes
from m2jax.tasks.video.scan import Scan
from m2jax.tasks.video.vectors import KINDS, Hits, Vectors

STATE = "library.json"
SKIPPED = "skipped.jsonl"
KEYFRAMES = "keyframes"
FORMAT = 1
ANN = (*KINDS, scan.KIND)  # how stored frames are searched
PAIRS = 4096  # of frames of different videos whose cosines tell what is ordinary
ORDINARY = 0.95  # share of such pairs below the background
ALONE = (
    "one video tells no background, and what is like it by its kind alone is taken for a copy: "
    "index others beside it, or search with --background COSINE"
)


@dataclass
class Video:
    """One of the library."""

    name: str
    path: str  # where it was when it was indexed
    mark: list[int]  # bytes and time of change, in ns
    frames: int  # that are stored
    stored: bool = False  # in the index
    length: int = 0  # frames of the video, where only keyframes are stored


@dataclass
class Library:
    """What ``library.json`` holds."""

    model: str
    fingerprint: str
    rate: float  # frames per second
    kind: str  # of index, one of ``ANN``
    uri: str  # of a cluster; "": the file beside
    videos: list[Video] = field(default_factory=list)
    keyframes: str = ""  # fingerprint of what chose them; "": all frames are stored
    background: float = 0.0  # cosine that unrelated frames seldom exceed; 0 for one video alone
    own: str = ""  # in the name of its collection on a cluster
    format: int = FORMAT


class Index(Protocol):
    """What can be searched."""

    def search(
        self, features: Float32[np.ndarray, "frames dim"], limit: int, kind: str, without: int = -1
    ) -> Hits:
        """The stored frames nearest to each feature, those of a video (its number) left out."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


class Done(NamedTuple):
    """What a run did."""

    videos: int
    frames: int
    skipped: int


def build(
    encoder: Encoder,
    videos: Mapping[str, Path],
    out: Path,
    *,
    rate: float = 1.0,
    kind: str = "hnsw",
    uri: str = "",
    choose: Keyframes | None = None,
    say: Callable[[str], None] = print,
) -> Done:
    """Indexes videos that are not there yet.

    Args:
        encoder: the model.
        videos: files by name.
        out: the library's folder.
        rate: frames per second.
        kind: ``hnsw`` or ``exact``, by Milvus; ``scan``: exact, without a database.
        uri: of a Milvus cluster; "": a file in the folder.
        choose: stores the keyframes that it gives, and no other frame.
        say: gets a line per video.

    Raises:
        UserError: the folder is of another model or other settings, or no video can be read.
    """
    if kind not in ANN:
        raise UserError(f"--ann {kind}: use one of {', '.join(ANN)}")
    if uri and kind == scan.KIND:
        raise UserError(f"--ann {kind}: needs no database: drop --milvus, or use hnsw or exact")
    library = Library(*encoder.identity, rate, kind, uri)
    if choose is not None:
        _check_model(choose, library)
        library.keyframes = saved.fingerprint(choose.part, choose.most)
    library = _claimed(out, library, secrets.token_hex(4) if uri else "")
    if choose is not None and not (out / KEYFRAMES).exists():
        saved.write(out / KEYFRAMES, choose.part)
    known = {video.name: number for number, video in enumerate(library.videos)}
    frames = 0
    skipped: list[tuple[str, str]] = []
    for name, path in videos.items():
        mark = _mark(path)
        if name in known:
            if library.videos[known[name]].mark != mark:
                raise UserError(
                    f"--out {out}: {name} has changed since: index it into a new folder"
                )
            continue
        try:
            found = encoder.video(path, rate)
        except UserError as error:
            skipped.append((name, str(error)))
            say(f"left out: {error}")
            continue
        known[name] = len(library.videos)
        length = 0
        if choose is not None:
            kept, length = choose(found), len(found)
            features.write(kept_file(out, known[name]), kept)
            found = found[kept]
        features.write(features_file(out, known[name]), found)
        library.videos.append(Video(name, str(path.absolute()), mark, len(found), length=length))
        _save(out, library)
        frames += len(found)
        say(f"{name}: {len(found):,} frames")
    _write_skipped(out, skipped)
    if not library.videos:
        raise UserError(f"--videos: none of {len(videos)} could be read: see {out / SKIPPED}")
    fresh = [number for number, video in enumerate(library.videos) if not video.stored]
    if fresh:
        _store(out, library, fresh)
    if len(library.videos) == 1:
        say(f"warning: {out}: {ALONE}")
    return Done(len(fresh), frames, len(skipped))


def _store(out: Path, library: Library, fresh: list[int]) -> None:
    if library.kind != scan.KIND:
        _insert(out, library, fresh)
    for number in fresh:
        library.videos[number].stored = True
    library.background = _background(out, library)
    _save(out, library)


def _insert(out: Path, library: Library, fresh: list[int]) -> None:
    vectors = _milvus(out, library)
    try:
        for number in fresh:
            found = arrays.read_array(features_file(out, number), "features")
            vectors.create(found.shape[1], library.kind)
            vectors.insert(number, found)
        vectors.flush()
    finally:
        vectors.close()


def _milvus(out: Path, library: Library) -> Vectors:
    # Frames are numbered from 0 in every library: on a cluster each has a collection of its own.
    name = "_".join(["m2jax", library.fingerprint, *filter(None, [library.own])])
    token = os.environ.get("MILVUS_TOKEN", "")
    return Vectors(library.uri or str(out / "frames.db"), name if library.uri else "frames", token)


def open_index(out: Path, library: Library) -> Index:
    """The library's index.

    Raises:
        UserError: nothing was put into it yet, or it cannot be opened.
    """
    if not any(video.stored for video in library.videos):
        raise UserError(f"--index {out}: indexing was not finished: run m2jax video index again")
    if library.kind == scan.KIND:
        files = [features_file(out, number) for number in range(len(library.videos))]
        return Scan(files, [video.frames for video in library.videos])
    return _milvus(out, library)


def features_file(out: Path, number: int) -> Path:
    """Where the features of a video lie."""
    return out / "features" / f"{number:08d}.npy"


def kept_file(out: Path, number: int) -> Path:
    """Where the numbers of a video's keyframes lie."""
    return out / "features" / f"{number:08d}.kept.npy"


def edges(out: Path, library: Library, number: int) -> Float[np.ndarray, " stored_and_1"]:
    """Where the time of each stored frame of a video starts, in frames, and where it ends.

    Raises:
        UserError: which frames are stored cannot be read, or is nonsense.
    """
    video = library.videos[number]
    if not library.keyframes:
        return np.arange(video.frames + 1.0)
    path = kept_file(out, number)
    kept = arrays.read_array(path, "keyframes", axes=1)
    whole = kept.dtype == np.int64 and len(kept) == video.frames
    if not whole or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= video.length:
        raise UserError(
            f"{path}: not the {video.frames:,} keyframes of {video.name:.80}: index anew"
        )
    return keyframes.edges(kept, video.length)


def load_keyframes(out: Path, library: Library) -> Keyframes | None:
    """What chose the keyframes of a library, for queries; none where it holds all frames.

    Raises:
        UserError: it is missing, damaged or another.
    """
    if not library.keyframes:
        return None
    try:
        most = float(library.keyframes.partition("/")[2])
    except ValueError:
        raise UserError(f"{out / STATE}: damaged (keyframes): index the videos anew") from None
    found = Keyframes(saved.read(out / KEYFRAMES), most)
    if saved.fingerprint(found.part, most) != library.keyframes:
        raise UserError(f"{out / KEYFRAMES}: is not what chose the stored frames: copy it again")
    return found


def load(out: Path, identity: Identity | None = None) -> Library:
    """What a folder holds.

    Args:
        out: the folder.
        identity: of the model that it is to be searched by, if it is.

    Raises:
        UserError: no library, a damaged one, or one of another model.
    """
    try:
        document = json.loads((out / STATE).read_text(encoding="utf-8"))
        videos = [Video(**video) for video in document.pop("videos")]
        library = Library(**document, videos=videos)
        sound = all(_is_sound(video) for video in videos) and library.kind in ANN
        sound &= isinstance(library.rate, (int, float)) and library.format == FORMAT
    except FileNotFoundError:
        raise UserError(f"--index {out}: no library of videos: make one with video index") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{out / STATE}: damaged ({error}): index the videos anew") from None
    if not sound:
        raise UserError(f"{out / STATE}: damaged, or of another version: index the videos anew")
    if identity is not None and identity.fingerprint != library.fingerprint:
        raise UserError(
            f"--index {out}: made with the model {library.model} ({library.fingerprint}), not "
            f"{identity.model} ({identity.fingerprint}): search with that one, or index anew"
        )
    return library


def _is_sound(video: Video) -> bool:
    texts = isinstance(video.name, str) and isinstance(video.path, str)
    counts = type(video.frames) is int and type(video.length) is int
    return texts and counts and 0 < video.frames < 2**24 and 0 <= video.length < 2**24


def _claimed(out: Path, wanted: Library, own: str) -> Library:
    """The library of the folder, which is made if there is none."""
    if not (out / STATE).exists():
        wanted.own = own
        try:
            out.mkdir(parents=True, exist_ok=True)
            _save(out, wanted)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}: choose another folder") from error
        return wanted
    found = load(out, Identity(wanted.model, wanted.fingerprint))
    for name in ("rate", "kind", "uri", "keyframes"):
        if getattr(found, name) != getattr(wanted, name):
            raise UserError(
                f"--out {out}: was made with {name} {getattr(found, name)!r}, not "
                f"{getattr(wanted, name)!r}: choose another folder"
            )
    return found


def _check_model(choose: Keyframes, library: Library) -> None:
    trained = choose.part.model
    if choose.part.scorer is not None and trained and trained != library.fingerprint:
        raise UserError(
            f"--keyframes: trained with the features of another model ({trained}, this one is "
            f"{library.fingerprint}): train one with --model of this"
        )


def _save(out: Path, library: Library) -> None:
    temporary = out / f".{STATE}.{os.getpid()}"
    temporary.write_text(json.dumps(dataclasses.asdict(library), indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / STATE)


def _write_skipped(out: Path, skipped: list[tuple[str, str]]) -> None:
    lines: list[str] = [
        json.dumps({"video": n, "why": why}, ensure_ascii=False) for n, why in skipped
    ]
    temporary = out / f".{SKIPPED}.{os.getpid()}"
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(out / SKIPPED)


def _mark(path: Path) -> list[int]:
    try:
        found: Any = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the path") from None
    return [found.st_size, found.st_mtime_ns]


def _background(out: Path, library: Library) -> float:
    """The cosine that 95 % of random pairs of frames of different videos stay below (our choice).

    Towers that were not trained to tell copies have high cosines everywhere; thresholds are meant
    for maps on which unrelated frames lie around 0. One video alone tells nothing: frames of one
    scene are far more alike than unrelated ones.
    """
    rng = np.random.default_rng(0)
    count = len(library.videos)
    if count < 2:
        return 0.0
    chosen = rng.permutation(count)[: min(count, 64)]
    samples = []
    for number in chosen:
        found = arrays.read_array(features_file(out, int(number)), "features")
        samples.append(found[rng.integers(0, len(found), 64)])
    one, other = rng.integers(0, len(samples), (2, PAIRS))
    apart = one != other
    frames = rng.integers(0, 64, (2, PAIRS))
    rows = np.stack(samples)
    cosines = (rows[one, frames[0]] * rows[other, frames[1]]).sum(axis=1)[apart]
    return float(np.clip(np.quantile(cosines, ORDINARY), 0.0, 1 - 1e-4))
