# SPDX-License-Identifier: Apache-2.0
"""Memory and time of importing a synthetic checkpoint of a published size.

    python benchmarks/convert.py [--arch m2-encoder-1b] [--dtype float32] [--devices 1] [--dir DIR]
    python benchmarks/convert.py --arch m2-encoder-10b --dtype float16 --one-by-one

Writes a safetensors file of random weights into DIR (removed afterwards), imports it, and prints
one row per phase: seconds, peak of anonymous memory (RssAnon: what the mapped file's pages are no
part of) above the start, and what of that the parameters themselves do not explain. On a CPU the
devices' memory is the host's, so the parameters are counted in and shown apart.

With --one-by-one the file is sparse (its weights are zeros and take no disk), and each parameter is
let go once it is placed, and then once more written: what an import needs of a host whose devices
have memory of their own, at sizes that this host could not hold. Nothing is checked then.
"""

import argparse
import dataclasses
import json
import shutil
import struct
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from m2jax.checkpoint import folder
from m2jax.checkpoint.convert import (
    check,
    inward,
    m2_arch,
    m2_inward,
    m2_layout,
    place,
    safetensors_file,
    weights,
)
from m2jax.models import params as params_lib

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


def write_zeros(file, cfg, dtype):
    """The same file of zeros, sparse; returns the largest tensor."""
    shapes, size = m2_layout.shapes(cfg), jax.numpy.dtype(dtype).itemsize
    code = next(c for c, known in safetensors_file.DTYPES.items() if known == dtype)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
    return max(int(np.prod(shape)) for shape in shapes.values()) * size


def one_by_one(file, arch, dtype, directory, largest):
    """Places and writes one parameter after the other; prints the worst of each phase."""
    cfg = dataclasses.replace(m2_arch.read(arch).model, param_dtype=dtype)
    found = m2_layout.official(weights.read(file).content, cfg, str(file))
    model = params_lib.abstract(cfg)
    places = params_lib.flatten(inward.layout(model, cfg.width, None))
    pieces = m2_inward.pieces(found.tensors, cfg)
    jax.block_until_ready(jax.numpy.zeros(()))
    start = anonymous_bytes()
    worst = {"read and place": (0, 0, ""), "write": (0, 0, "")}
    total = dict.fromkeys(worst, 0.0)
    for number, (name, shape) in enumerate(params_lib.flatten(model.params).items()):
        one = model._replace(params={name: shape})

        def read(one=one, name=name):
            return jax.block_until_ready(
                place.place(one, {name: places[name]}, pieces, fresh=lambda names: {})
            )

        def write(params, number=number):
            folder.write(directory / str(number), cfg, params, tokenizer=None, preprocess={})

        params, seconds, peak = measured(read)
        held = sum(s.data.nbytes for s in params[name].addressable_shards)
        rows = {"read and place": (seconds, peak)}
        rows["write"] = measured(lambda params=params: write(params))[1:]
        shutil.rmtree(directory / str(number))
        for phase, (seconds, peak) in rows.items():
            total[phase] += seconds
            worst[phase] = max(worst[phase], (peak - start - held, held, name))
        del params
    for phase, (extra, held, name) in worst.items():
        print(
            f"| {phase} | {total[phase]:.1f} | {(extra + held) / MB:.0f} | {extra / MB:.0f} | "
            f"{extra / largest:.2f} | {name}"
        )


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="m2-encoder-1b")
    parser.add_argument("--dtype", default="float32", choices=inward.DTYPES)
    parser.add_argument("--devices", type=int, default=1, help="virtual devices of the CPU")
    parser.add_argument("--dir", help="where the files go (default: the system's)")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--one-by-one", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        file, model_dir = Path(directory) / "synthetic.safetensors", Path(directory) / "model"
        make = write_zeros if args.one_by_one else write_random
        largest = make(file, m2_arch.read(args.arch).model, args.dtype)
        jax.block_until_ready(jax.numpy.zeros(()))
        start = anonymous_bytes()
        print(f"largest tensor {largest / MB:.0f} MB, file {file.stat().st_size / MB:.0f} MB")
        print("| phase | seconds | peak MB | without the parameters | x largest tensor |")
        print("|---|---|---|---|---|")
        if args.one_by_one:
            one_by_one(file, args.arch, args.dtype, Path(directory), largest)
            return

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
        rows = []
        if not args.no_check:
            rows, seconds, peak = measured(imported.check)
            row("check", seconds, peak, held)
        print(f"before the write: {(anonymous_bytes() - start - held) / MB:.0f} MB")
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
