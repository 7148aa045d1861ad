# SPDX-License-Identifier: Apache-2.0
"""Bulk embedding: records a second, and memory while their number grows.

    python benchmarks/embed.py [--records 1000000] [--shard 50000]

Writes shards of small pictures with two captions each (made here, from a fixed seed), a model with
random weights, and runs ``m2jax embed --shards`` on them in a process of its own whose memory is
read from the kernel each time a shard is done. What is measured is the path, not a model: the model
is tiny on purpose.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from m2jax import config
from m2jax.checkpoint import folder
from m2jax.data.build import shards, work
from m2jax.data.build.records import Caption, Record, encode
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.dist.host import load_devices
from m2jax.models import params as params_lib

SIZES = {"width": 16, "heads": 2, "backbone_layers": 1, "vl_layers": 1, "out_dim": 16}
PICTURES = 500


def write_model(place):
    """A model of 16 pixels, 8 tokens and two layers."""
    model = config.resolve(
        config.Model(**SIZES, image_size=16, patch_size=8, vocab_size=200, max_text_len=8)
    )
    tokenizer = SentencePieceTokenizer(
        train_tokenizer([f"thing {i} 东西" for i in range(99)], 80), 8
    )
    folder.write(
        place,
        model,
        params_lib.initialise(model, jax.random.key(0)),
        tokenizer=tokenizer.to_dict(),
        preprocess=Preprocess(16).to_dict(),
    )


def write_shards(place, count, each):
    """JPEGs of 24 x 24 pixels, each with a sentence in two languages."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(out, "JPEG", quality=80)
        pictures.append(out.getvalue())
    place.mkdir()
    parts = -(-count // each)
    for part in range(parts):
        with work.records(place / shards.file_name(part, parts)) as file:
            for number in range(part * each, min((part + 1) * each, count)):
                captions = Caption(f"thing {number}", "en"), Caption(f"东西 {number}", "zh")
                image = pictures[number % PICTURES]
                file.write(encode(Record(f"r{number}", image, captions, "made", "CC0")))


def resident(pid):
    """Bytes of a process in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def main():
    """Prints a line per shard and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--shard", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    args = parser.parse_args()
    load_devices()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        place = Path(name)
        write_model(place / "model")
        write_shards(place / "shards", args.records, args.shard)
        command = [sys.executable, "-m", "m2jax", "embed", "--model", str(place / "model")]
        command += ["--shards", f"{place}/shards/*", "--out", str(place / "out")]
        command += ["--batch-size", str(args.batch)]
        begin, memory = time.perf_counter(), []
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line.startswith("embed: "):
                memory.append(resident(process.pid))
                print(f"{line.strip()}; {memory[-1] / 1e6:.0f} MB", flush=True)
            else:
                print(line, end="", flush=True)
        if process.wait():
            raise SystemExit(process.returncode)
        took = time.perf_counter() - begin
        row = {
            "records": args.records,
            "seconds": round(took, 1),
            "records/s": round(args.records / took),
            "MB after the first shard": round(memory[0] / 1e6),
            "MB after the last": round(memory[-1] / 1e6),
            "MB at most": round(max(memory) / 1e6),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
