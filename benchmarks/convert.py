# SPDX-License-Identifier: Apache-2.0
"""Memory and time of importing a synthetic checkpoint of a published size.

    python benchmarks/convert.py [--arch m2-encoder-1b] [--dtype float32] [--devices 1] [--dir DIR]

Writes a safetensors file of random weights into DIR (removed afterwards), imports it, and prints
one row per phase: seconds, peak of anonymous memory (RssAnon: what the mapped file's pages are no
part of) above the start, and what of that the parameters themselves do not explain. On a CPU the
devices' memory is the host's, so the parameters are counted in and shown apart.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from m2jax.checkpoint import folder
from m2jax.checkpoint.convert import check, inward, m2_arch, m2_layout, safetensors_file

MB = 2**20


def anonymous_bytes():
    """Anonymous resident memory of this process; mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this needs Linux's /proc/self/status")


class Peak(threading.Thread):
    """The highest ``anonymous_bytes`` while it runs, looked at every 5 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._stopped = 0, threading.Event()

    def run(self):
        """Samples until told to stop."""
        while not self._stopped.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self):
        """Ends the sampling; returns the highest value."""
        self._stopped.set()
        self.join()
        return max(self.bytes, anonymous_bytes())


def measured(work):
    """Runs ``work``; returns its result, seconds and peak bytes."""
    peak, start = Peak(), time.perf_counter()
    peak.start()
    result = work()
    return result, time.perf_counter() - start, peak.stop()


def write_random(file, cfg, dtype):
    """A checkpoint of random weights that keep activations in scale; returns the largest tensor."""
    shapes, rng = m2_layout.shapes(cfg), np.random.default_rng(0)

    def tensor(name):
        shape = shapes[name]
        array = rng.standard_normal(shape, np.float32)
        if "norm" in name or "_ln" in name:
            return array * 0.1 + name.endswith("weight")
        return array * 0.02 if len(shape) < 2 or "embed" in name else array / shape[-1] ** 0.5

    with file.open("wb") as handle:
        safetensors_file.write(handle, shapes, np.dtype(jax.numpy.dtype(dtype)), tensor)
    return max(np.prod(shape) for shape in shapes.values()) * jax.numpy.dtype(dtype).itemsize


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="m2-encoder-1b")
    parser.add_argument("--dtype", default="float32", choices=inward.DTYPES)
    parser.add_argument("--devices", type=int, default=1, help="virtual devices of the CPU")
    parser.add_argument("--dir", help="where the files go (default: the system's)")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        file, model_dir = Path(directory) / "synthetic.safetensors", Path(directory) / "model"
        largest = write_random(file, m2_arch.read(args.arch).model, args.dtype)
        jax.block_until_ready(jax.numpy.zeros(()))
        start = anonymous_bytes()
        print(f"largest tensor {largest / MB:.0f} MB, file {file.stat().st_size / MB:.0f} MB")
        print("| phase | seconds | peak MB | without the parameters | x largest tensor |")
        print("|---|---|---|---|---|")

        def row(phase, seconds, peak, params):
            extra = peak - start - params
            print(
                f"| {phase} | {seconds:.1f} | {(peak - start) / MB:.0f} | {extra / MB:.0f} | "
                f"{extra / largest:.2f} |"
            )

        imported, seconds, peak = measured(lambda: inward.read(file, arch=args.arch))
        leaves = jax.tree.leaves(imported.params)
        jax.block_until_ready(leaves)
        held = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
        row("read and place", seconds, peak, held)
        rows, seconds, peak = measured(imported.check)
        row("check", seconds, peak, held)
        write = folder.write
        _, seconds, peak = measured(
            lambda: write(
                model_dir,
                imported.config,
                imported.params,
                tokenizer=None,
                preprocess=imported.preprocess.to_dict(),
            )
        )
        row("write", seconds, peak, held)
        size = sum(p.stat().st_size for p in model_dir.rglob("*") if p.is_file())
        print(f"parameters {held / MB:.0f} MB; model folder {size / MB:.0f} MB")
        print(check.table(rows))


if __name__ == "__main__":
    main()
