# SPDX-License-Identifier: Apache-2.0
"""Encoding speed of M2-Encoder 0.4B: m2jax against a plain PyTorch model of the same shapes.

    make test-torch                                   # once: makes .venv-torch
    .venv-torch/bin/python benchmarks/encode.py [--rounds 7] [--batches 1 8 32]

Both models run in this process on the same threads in float32, in turn (jax, torch, jax, torch
...), with random weights. The PyTorch model is written as a PyTorch user would: fused
``scaled_dot_product_attention``, ``inference_mode``, the same norms in the same places. Prints a
table row per modality and batch: items per second (median), and the median of the paired ratios.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from m2jax.bundle import Bundle
from m2jax.config import Model, resolve
from m2jax.data.image import Preprocess
from m2jax.dist.host import TUNABLE, restart_with_huge_pages
from m2jax.models import params as params_lib

EPS = 1e-5


class Layer(nn.Module):
    """Pre-norm with inner norms, one modality's weights."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.inner_norm, self.ffn_norm = (
            nn.LayerNorm(width, EPS) for _ in range(3)
        )
        self.mlp_norm = nn.LayerNorm(4 * width, EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        """[b, n, d] -> [b, n, d]; ``mask`` is True at the keys that count."""
        b, n, d = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(self.inner_norm(heads.transpose(1, 2).reshape(b, n, d)))
        return x + self.fc2(self.mlp_norm(functional.gelu(self.fc1(self.ffn_norm(x)))))


class Tower(nn.Module):
    """Tokens to unit features: backbone and vl layers, each with its last norm."""

    def __init__(self, cfg, embed):
        super().__init__()
        self.embed = embed
        depths = (cfg.backbone_layers, cfg.vl_layers)
        self.stacks = nn.ModuleList(
            nn.ModuleList(Layer(cfg.width, cfg.heads) for _ in range(n)) for n in depths
        )
        self.norms = nn.ModuleList(nn.LayerNorm(cfg.width, EPS) for _ in depths)
        self.head = nn.Linear(cfg.width, cfg.out_dim, bias=False)

    def forward(self, x, mask=None):
        """Pixels or ids -> unit rows."""
        x = self.embed(x)
        for stack, norm in zip(self.stacks, self.norms, strict=True):
            for layer in stack:
                x = layer(x, mask)
            x = norm(x)
        return functional.normalize(self.head(x[:, 0]), dim=-1)


class ImageEmbed(nn.Module):
    """Patches by a strided convolution, [CLS], positions."""

    def __init__(self, cfg):
        super().__init__()
        tokens = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.conv = nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.positions = nn.Parameter(torch.randn(tokens, cfg.width))

    def forward(self, pixels):
        """[b, 3, h, w] in [0, 1] -> tokens."""
        x = self.conv((pixels - 0.5) / 0.5).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions


class TextEmbed(nn.Module):
    """A row per token, positions."""

    def __init__(self, cfg):
        super().__init__()
        self.table = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Parameter(torch.randn(cfg.max_text_len, cfg.width))

    def forward(self, ids):
        """[b, n] -> tokens."""
        return self.table(ids) + self.positions


def contenders(cfg, modality, batch, rng):
    """Two functions without arguments that encode one batch: (m2jax's, PyTorch's)."""
    model = params_lib.abstract(cfg)
    bundle = Bundle(
        cfg,
        model.graph,
        jax.jit(params_lib.initialise, static_argnums=0)(cfg, jax.random.key(0)),
        None,
        Preprocess(cfg.image_size),
    )
    if modality == "image":
        pixels = rng.random((batch, cfg.image_size, cfg.image_size, 3), np.float32)
        tower = Tower(cfg, ImageEmbed(cfg)).eval()
        tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        return lambda: bundle.encode_image(pixels).block_until_ready(), lambda: tower(tensor)
    ids = rng.integers(0, cfg.vocab_size, (batch, cfg.max_text_len)).astype(np.int32)
    mask = np.arange(cfg.max_text_len) < rng.integers(4, cfg.max_text_len, (batch, 1))
    tower = Tower(cfg, TextEmbed(cfg)).eval()
    tensor = torch.from_numpy(ids.astype(np.int64))
    keys = torch.from_numpy(mask)[:, None, None, :]
    return lambda: bundle.encode_text(ids, mask).block_until_ready(), lambda: tower(tensor, keys)


def seconds(function):
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="m2-encoder-0.4b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--attention", default="sample", help="sample is what m2jax.load takes on one CPU device"
    )
    parser.add_argument("--unroll", type=int, default=1, help="layers per scan iteration")
    args = parser.parse_args()
    made = Model(name=args.arch, dtype="float32", attention=args.attention, unroll=args.unroll)
    cfg = resolve(made)
    rng = np.random.default_rng(0)
    print(f"{os.environ.get(TUNABLE, 'no huge pages')}; attention by {args.attention}")
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| | batch | m2jax / s | PyTorch / s | m2jax / PyTorch |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for modality in ("image", "text"):
            for batch in args.batches:
                ours, theirs = contenders(cfg, modality, batch, rng)
                for function in (ours, theirs, ours, theirs):
                    function()
                pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
                ratio = statistics.median(b / a for a, b in pairs)
                a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
                print(
                    f"| {modality} | {batch} | {batch / a:.1f} | {batch / b:.1f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
