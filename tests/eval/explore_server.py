# SPDX-License-Identifier: Apache-2.0
"""``m2jax explore`` over toy models, for a process of its own.

Gradio leaves event loops and sockets to the garbage collector, which would show in other tests.
"""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np

from m2jax import bundle
from m2jax.cli.main import main
from tests.eval.pictures import ColourModel


class Model(ColourModel):
    def logits(self, images, texts):
        return 100 * np.asarray(images) @ np.asarray(texts).T


class Contrary(Model):
    """Finds the opposite of what is asked for."""

    def encode_text(self, ids, mask):
        return -super().encode_text(ids, mask)


MODELS = {"plain": Model, "contrary": Contrary}


@contextlib.contextmanager
def serving(folder, cache, *options):
    """The verb in another process until the block ends; gives its first line and the process."""
    models = [word for name in MODELS for word in ("--model", name)]
    words = ["explore", "--images", str(folder), *models, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.eval.explore_server", *words],
        env={**os.environ, "TMPDIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline(), process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        process.stdout.close()


if __name__ == "__main__":
    bundle.load = lambda path: MODELS[path]()
    sys.exit(main(sys.argv[1:]))
