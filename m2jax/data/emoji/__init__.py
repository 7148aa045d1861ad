# SPDX-License-Identifier: Apache-2.0
"""The embedded bilingual data set: emoji as several vendors drew them, named in en and zh.

``ensure`` builds it at first use from pinned packages; ``load`` reads it.
"""

from m2jax.data.emoji.build import ensure
from m2jax.data.emoji.dataset import Concept, Drawings, EmojiData, default_directory, load

__all__ = ["Concept", "Drawings", "EmojiData", "default_directory", "ensure", "load"]
