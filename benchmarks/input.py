# SPDX-License-Identifier: Apache-2.0
"""The input pipeline alone: samples per second and core, against webdataset with PIL.

    pip install --no-deps --target .cache/bench webdataset braceexpand    # once; the other side
    PYTHONPATH=.cache/bench python benchmarks/input.py [--seconds 4] [--rounds 5]

Both sides read the same tars of JPEGs with captions (made here, from a fixed seed) and do the same:
decode, convert to RGB, PIL's bicubic resize to a square, tokenise the caption, stack ``--batch``
rows of uint8 pixels and ids. webdataset reads its shards in order through its shuffle buffer, the
way it is meant to; m2jax reads at random. One process, one core, in turn (m2jax, webdataset, m2jax
with ``data.draft``, which webdataset has no word for, m2jax from ArrayRecord shards as a build
writes them, m2jax with M2's training transform, m2jax ...); then m2jax's whole loader on all cores,
in threads and in worker processes; then the demo's own batches against what its step takes.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from m2jax import config
from m2jax.config_files import load_config
from m2jax.data.build import work
from m2jax.data.build.records import Caption, Record, encode
from m2jax.data.image import Preprocess
from m2jax.data.pairs import PairBatches
from m2jax.data.shards import ShardPairs
from m2jax.data.tars import TarPairs
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer

WORDS = "a photo of the small red green old house dog cat street river under over with two".split()
# Width and height of the JPEGs, side they are resized to, how many.
SOURCES = (((1280, 960), 224, 200), ((256, 256), 224, 1000), ((64, 64), 32, 3000))
DEMO_STEP = 270 * 4  # drawings a second: what the demo's training step takes (benchmarks/step.md)


def photo(rng, width, height):
    """Noise with the spectrum of photographs: octaves, each twice as fine and half as strong."""
    image = np.zeros((height, width, 3), np.float32)
    cells = 2
    strength = 60.0
    while cells < max(width, height):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((width, height), 2) for c in range(3)]
        image += np.stack([np.asarray(layer) for layer in layers], -1)
        cells, strength = 2 * cells, strength / 2
    return Image.fromarray(np.clip(image + 128, 0, 255).astype(np.uint8))


def write_tars(folder, count, size, *, per_tar=500):
    """Tars of JPEGs of quality 85 with captions, in webdataset's layout."""
    rng = np.random.default_rng(0)
    files = []
    for first in range(0, count, per_tar):
        files.append(folder / f"{first // per_tar:05d}.tar")
        with tarfile.open(files[-1], "w") as tar:
            for number in range(first, min(first + per_tar, count)):
                out = io.BytesIO()
                photo(rng, *size).save(out, "JPEG", quality=85)
                caption = " ".join(rng.choice(WORDS, 9)).encode()
                for kind, data in (("jpg", out.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:06d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return files


def as_shards(files):
    """The same samples in one shard per tar."""
    shards = [file.with_suffix(".array_record") for file in files]
    for file, shard in zip(files, shards, strict=True):
        with tarfile.open(file) as tar, work.records(shard) as out:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
            for (name, image), (_, text) in zip(members[::2], members[1::2], strict=True):
                caption = Caption(text.decode(), "en")
                out.write(encode(Record(name, image, (caption,), "made", "CC0")))
    return shards


def ours(files, folder, args, tokenizer, *, draft=False, shards=False, transform="none"):
    """An endless iterator of batches by m2jax, in this thread."""
    cfg = config.Data(batch_size=args.batch, languages=("en",), transform=transform)
    at_least = 2 * args.size if draft else 0
    if shards:
        pairs = ShardPairs(as_shards(files))
    else:
        pairs = TarPairs(files, folder / "indices", language="en", at_least=at_least)
    preprocess = Preprocess(args.size)
    source = PairBatches(
        {"tars": pairs}, [1.0], cfg, tokenizer=tokenizer, preprocess=preprocess, seed=0
    )
    index = 0
    while True:
        yield source.batch(index, slice(0, args.batch))
        index += 1


def theirs(files, args, tokenizer):
    """The same by webdataset and PIL, in this thread."""
    import webdataset

    def decode(data):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.resize((args.size, args.size), Image.Resampling.BICUBIC))

    def stack(rows):
        images, captions = zip(*rows, strict=True)
        tokens = tokenizer([caption.decode() for caption in captions])
        return {"image": np.stack(images), "text": tokens.ids, "text_mask": tokens.mask}

    data = webdataset.WebDataset([str(f) for f in files], shardshuffle=len(files))
    rows = data.shuffle(1000, initial=1000).to_tuple("jpg", "txt").map_tuple(decode, lambda x: x)
    return iter(rows.batched(args.batch, collation_fn=stack, partial=False).repeat())


def rate(batches, seconds, batch):
    """Samples per second of wall clock, and the share of it that this process computed."""
    next(batches)
    begin, cpu, rows = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        rows += batch
    took = time.perf_counter() - begin
    return rows / took, (time.process_time() - cpu) / took


def one_core(files, folder, args, tokenizer):
    """Medians of both sides and of their paired ratios, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    sides = {
        "m2jax": ours(files, folder, args, tokenizer),
        "webdataset": theirs(files, args, tokenizer),
        "draft": ours(files, folder, args, tokenizer, draft=True),
        "shards": ours(files, folder, args, tokenizer, shards=True),
        "m2": ours(files, folder, args, tokenizer, transform="m2"),
    }
    found = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, batches in sides.items():
            found[name].append(rate(batches, args.seconds, args.batch)[0])
    os.sched_setaffinity(0, cores)
    pairs = zip(found["m2jax"], found["webdataset"], strict=True)
    return {name: statistics.median(v) for name, v in found.items()} | {
        "ratio": statistics.median(a / b for a, b in pairs)
    }


def whole_loader(files, folder, args, tokenizer, **data):
    """m2jax's loader on all cores, batches put on the device."""
    from m2jax.data.loader import Loader
    from m2jax.dist.mesh import make_mesh

    cfg = config.Data(batch_size=args.batch, languages=("en",), **data)
    source = PairBatches(
        {"tars": TarPairs(files, folder / "indices", language="en")},
        [1.0],
        cfg,
        tokenizer=tokenizer,
        preprocess=Preprocess(args.size),
        seed=0,
    )
    loader = Loader(
        source,
        make_mesh(config.Mesh()),
        args.batch,
        cfg.prefetch,
        workers=cfg.workers,
        device_prefetch=cfg.device_prefetch,
    )
    for _ in range(2 * cfg.prefetch):  # what was prepared before the clock started
        next(loader)
    found = rate(loader, args.seconds, args.batch)[0]
    loader.close()
    return found


def demo(args):
    """Drawings a second that the demo's own loader delivers."""
    from m2jax.data.loader import make_loader
    from m2jax.dist.mesh import make_mesh

    cfg = load_config("emoji")
    loader = make_loader(cfg, make_mesh(config.Mesh()))
    found = rate(loader, args.seconds, cfg.data.batch_size * cfg.data.views)[0]
    loader.close()
    return found


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    tokenizer = SentencePieceTokenizer(train_tokenizer([" ".join(WORDS)] * 9, 200), 32)
    print(
        "| JPEGs | to | m2jax / s | webdataset + PIL / s | m2jax / webdataset | data.draft / s | "
        "shards / s | M2's transform / s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for source, size, count in SOURCES:
        args.size = size
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = write_tars(folder, count, source)
            one = one_core(files, folder, args, tokenizer)
            print(
                f"| {source[0]} x {source[1]} | {size} | {one['m2jax']:,.0f} | "
                f"{one['webdataset']:,.0f} | {one['ratio']:.2f} | {one['draft']:,.0f} | "
                f"{one['shards']:,.0f} | {one['m2']:,.0f} |",
                flush=True,
            )
            if size != 224 or source[0] != 256:
                continue
            every = os.cpu_count() or 1
            rows = [
                f"{label}: {whole_loader(files, folder, args, tokenizer, **data):,.0f} samples/s"
                for label, data in (
                    ("1 thread", {"prefetch": 1}),
                    (f"{every} threads", {"prefetch": every}),
                    (f"{every} workers", {"prefetch": 2 * every, "workers": every}),
                )
            ]
    print(f"\nwhole loader, 256 x 256 to 224, {every} cores: {'; '.join(rows)}")
    drawings = demo(args)
    print(f"demo: {drawings:,.0f} drawings/s, {drawings / DEMO_STEP:.1f} x the step's {DEMO_STEP}")


if __name__ == "__main__":
    main()
