# SPDX-License-Identifier: Apache-2.0
"""``python -m m2jax`` is ``m2jax``."""

import sys

from m2jax.cli.main import main

sys.exit(main())
