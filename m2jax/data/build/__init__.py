# SPDX-License-Identifier: Apache-2.0
"""Raw image-text collections to cleaned, deduplicated training shards, on Apache Beam.

``pipeline.build`` is the story, top to bottom. Records travel between its stages as files of the
work folder, one set per unit of input, and not through Beam's shuffles: a build that was killed
goes on where it was, and memory does not grow with the number of records. What Beam shuffles are
signatures of a hundred bytes (``duplicates``).
"""

INSTALL = "pip install 'm2jax[build]'"
