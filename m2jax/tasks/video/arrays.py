# SPDX-License-Identifier: Apache-2.0
"""Features and similarity maps in NumPy files, as VCSL distributes them; hostile until checked."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from m2jax.config import UserError
from m2jax.data import npz
from m2jax.tasks.video import maps
from m2jax.tasks.video.maps import Map

UNIT = 0.01  # a row of features may differ from length 1 by so much (they may be half precision)


def read_array(path: Path, what: str, axes: int = 2) -> np.ndarray:
    """The finite numbers of an .npy file: [rows, columns], or in one row.

    Raises:
        UserError: missing, damaged, holding objects, claiming more than it holds, or not such an
            array.
    """
    try:
        with path.open("rb") as opened:
            found = npz.read_npy(opened, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: check the path") from None
    except npz.DAMAGED as error:
        raise UserError(f"{path}: no NumPy array ({npz.reason(error)}): write it anew") from None
    if axes == 2:
        return maps.checked(found, f"{path}: {what}")
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise UserError(f"{path}: {what}: {found.dtype} of shape {found.shape}: write it anew")
    return found


def read_map(folder: Path, pair: str) -> Map:
    """The similarity map of a pair.

    Raises:
        UserError: unreadable, or no map.
    """
    return read_array(_inside(folder, pair), "similarity map")


@functools.lru_cache(maxsize=256)  # a query is in many pairs that follow each other
def read_features(folder: Path, video: str) -> np.ndarray:
    """Features of a video's frames, unit rows.

    Raises:
        UserError: unreadable, or rows of another length.
    """
    path = _inside(folder, video)
    found = read_array(path, "features")
    lengths = np.linalg.norm(found.astype(np.float32), axis=1)
    if np.abs(lengths - 1).max() > UNIT:
        row = int(np.abs(lengths - 1).argmax())
        raise UserError(f"{path}: row {row} has length {lengths[row]:.3g}: divide rows by theirs")
    return found


def videos_of(pair: str) -> tuple[str, str]:
    """Query and reference of a pair ``QUERY-REFERENCE``.

    Raises:
        UserError: no such pair.
    """
    query, dash, reference = pair.partition("-")
    if not dash or "-" in reference:
        raise UserError(f"pair {pair:.80}: not QUERY-REFERENCE: names of videos hold no dash")
    return query, reference


def features_of_pair(folder: Path, pair: str) -> tuple[np.ndarray, np.ndarray]:
    """The features of both videos of a pair ``QUERY-REFERENCE``.

    Raises:
        UserError: no such pair, unreadable features, or features of two kinds.
    """
    query, reference = videos_of(pair)
    one, other = read_features(folder, query), read_features(folder, reference)
    if one.shape[1] != other.shape[1]:
        raise UserError(
            f"{folder}: features of {query:.40} and {reference:.40} have {one.shape[1]} and "
            f"{other.shape[1]} numbers: use those of one model"
        )
    return one, other


def map_of_features(folder: Path, pair: str) -> Map:
    """The cosine map of a pair ``QUERY-REFERENCE``, from the features of both.

    Raises:
        UserError: as ``features_of_pair``.
    """
    return maps.cosine(*features_of_pair(folder, pair))


def _inside(folder: Path, name: str) -> Path:
    """The file of that name; names come from tables, and lead nowhere else."""
    if not name or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        raise UserError(f"{folder}: {name!r:.80} is no name of a video: mend the table of pairs")
    return folder / f"{name}.npy"
