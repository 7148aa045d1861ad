# SPDX-License-Identifier: Apache-2.0
"""``m2jax video``: copied segments between videos."""

from __future__ import annotations

from typing import Any

from m2jax.cli import video_align, video_eval, video_index, video_search, video_train


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its actions."""
    parser = subparsers.add_parser(
        "video",
        help="find copied segments between videos, and score such findings",
        description="Finds which parts of a video were copied from which parts of others, and "
        "scores any method the way VCSL does.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action in (video_index, video_search, video_train, video_align, video_eval):
        action.add_parser(actions)
    for subparser in actions.choices.values():
        subparser.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
