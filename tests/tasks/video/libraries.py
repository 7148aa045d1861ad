# SPDX-License-Identifier: Apache-2.0
"""A library of three videos and a query with parts of two, for tests."""

import numpy as np

from m2jax.tasks.video import features, library

# By video the frames of a copy: from and to in the query, from and to in the video.
TRUTH = {"a.mp4": (10, 24, 5, 19), "sub/b.mkv": (30, 42, 20, 32)}
# A path of TN may start at any frame up to a step before its first similar one.
SLACK = {"TN": 9, "DP": 1}
SETTINGS = {"TN": ["min_sim=0.5", "min_length=3"], "DP": ["discontinue=1", "min_sim=1.5"]}


def pixels(self, squares):
    """Centred pixels as unit rows: random weights find all frames alike."""
    rows = np.stack([np.asarray(s.resize((4, 3)), np.float32).ravel() for s in squares])
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index(encoder, videos, out, **options):
    """Indexes them."""
    found = features.find_videos([videos / "library"], "--videos")
    return library.build(encoder, found, out, say=lambda line: None, **options)


def near(match, expected, slack):
    """Whether a match lies where a copy is."""
    return np.abs(np.array(match[1:5]) - expected).max() <= slack
