# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of matrix products, counted three ways that check each other.

In the traced step (every scan times its length), in the compiled program (every loop times its
trips), and from the model's sizes (6 x the parameters each token uses, and attention). Only matrix
products and convolutions count: XLA's own sum takes a loop's body once.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from m2jax.config import Experiment
from m2jax.dist.topology import Chip
from m2jax.models.params import Abstract, flatten
from m2jax.plan.hlo import Array, Computation, HloError, Instruction, Module
from m2jax.plan.loops import Visit
from m2jax.train.flops import traced as traced


def from_sizes(experiment: Experiment, model: Abstract) -> float:
    """FLOPs of a step over all devices by the rule of thumb, made exact for attention.

    2 per parameter and token forward, twice that backward (Kaplan et al. 2020, table 1): 6 x the
    parameters of the layers each token passes, and 12 tokens x keys x width per layer and sample
    for attention. ITC heads, embeddings and the contrast are left out: a lower bound by about a
    percent. A caption's words are, since a vocabulary is as large as many layers.
    """
    cfg, data, loss = experiment.model, experiment.data, experiment.loss
    kernels = {name: leaf.size for name, leaf in flatten(model.params).items() if "kernel" in name}
    patches, words = (cfg.image_size // cfg.patch_size) ** 2, cfg.max_text_len
    image = 1 + patches

    def used(*stacks: str) -> int:
        return sum(n for name, n in kernels.items() if name.startswith(stacks))

    def encoder(tokens: int, backbone: str) -> float:
        weights = used(f"backbone.blocks.{backbone}.", "vl.blocks.A.")
        layers = cfg.backbone_layers + cfg.vl_layers
        return 6 * tokens * weights + 12 * layers * tokens**2 * cfg.width

    def decoder(name: str, depth: int, tokens: int, memory: int) -> float:
        blocks = f"heads.{name}.decoder.blocks."
        remembered = used(f"{blocks}cross_k.", f"{blocks}cross_v.")
        weights = 6 * tokens * (used(blocks) - remembered) + 6 * memory * remembered
        return weights + 12 * depth * tokens * (tokens + memory) * cfg.width

    def joint() -> float:
        """Image and text as one sequence; A and B weights of the vl layers are as many."""
        backbone = image * used("backbone.blocks.A.") + words * used("backbone.blocks.B.")
        tokens, layers = image + words, cfg.backbone_layers + cfg.vl_layers
        weights = backbone + tokens * used("vl.blocks.A.")
        return 6 * weights + 12 * layers * tokens**2 * cfg.width

    if loss.visual_tokenizer.weight:  # alone: one view, no text
        teaches = loss.visual_tokenizer.target == "features"
        teacher = encoder(image, "A") / 3 if teaches else 0.0  # forward only
        return data.batch_size * (teacher + _tokenizer_step(model, patches))
    sequence = encoder(image, "A") * data.views
    texts = encoder(words, "B")
    if loss.caption.weight:
        chosen = loss.caption.patches != "all"
        memory = 1 + (max(1, round(loss.caption.ratio * patches)) if chosen else patches)
        texts += decoder("caption", loss.caption.layers, words - 1, memory)
        texts += 6 * (words - 1) * model.params["text_embed"].size
    if loss.masked_image.weight:
        texts += encoder(image, "A")
        texts += decoder("masked_image", loss.masked_image.layers, image, words)
        if loss.masked_image.target == "tokens":
            table = model.params["heads"]["masked_image"]["tokens"]["embed"]
            texts += _told(loss.masked_image.ratio, table, model, patches)
    if loss.masked_text.weight:
        head = used("m2_heads.masked_text.") + model.params["text_embed"].size
        texts += joint() + 6 * words * head
    if loss.masked_tokens.weight:
        table = model.params["m2_heads"]["masked_tokens"]["embed"]
        texts += joint() + _told(loss.masked_tokens.ratio, table, model, patches)
    return data.batch_size * (sequence + texts * len(data.languages))


def _told(ratio: float, table: Any, model: Abstract, patches: int) -> float:
    """Logits of an image's masked patches, there and back, and the tokens they must tell."""
    hidden = max(1, round(ratio * patches))
    return 6 * hidden * table.size + _tokenizer_forward(model, patches)


def _tokenizer_forward(model: Abstract, patches: int) -> float:
    """The frozen tokenizer's code words of one image: no gradient, and nothing of its decoder."""
    own = model.params["visual_tokenizer"]
    search = 2 * patches * own["codebook"]["embed"].size
    return search + _tokens_through(own, patches, "encoder", "patch_in", "code")


def _tokenizer_step(model: Abstract, patches: int) -> float:
    """One image through a tokenizer that learns, and back: to no words searched, to no pixels."""
    own = model.params["visual_tokenizer"]
    search = 2 * patches * (own["codebook"]["embed"].size - own["patch_in"]["kernel"].size)
    there = _tokens_through(own, patches, "encoder", "patch_in", "code")
    return search + 3 * (there + _tokens_through(own, patches, "decoder", "word_in", "out"))


def _tokens_through(own: dict[str, Any], patches: int, stack: str, *linears: str) -> float:
    """Forward of one image's patches through a stack and the maps before and after it."""
    names = tuple(f"{part}." for part in (stack, *linears))
    kernels = (n for n in flatten(own).items() if n[0].startswith(names) and "kernel" in n[0])
    depth, _, width = own[stack]["blocks"]["q"]["kernel"].shape
    return 2 * patches * sum(leaf.size for _, leaf in kernels) + 4 * depth * patches**2 * width


def of_program(module: Module, visits: Iterable[Visit], chip: Chip) -> tuple[float, float]:
    """FLOPs of a whole program on one device, and the seconds they take at the chip's peak."""
    total = seconds = 0.0
    for visit in visits:
        one = visit.instruction
        if one.opcode in ("dot", "convolution", "custom-call"):
            work = instruction_flops(module, visit.computation, one) * visit.times
            narrow = work and is_narrow(visit.computation, one)
            total += work
            seconds += work / (chip.peak_flops * (chip.narrow_factor if narrow else 1.0))
    return total, seconds


def is_narrow(computation: Computation, instruction: Instruction) -> bool:
    """Whether a product takes numbers of 8 bits on both sides."""
    return all(operand(computation, instruction, i).dtype in NARROW for i in (0, 1))


NARROW = {"s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3fnuz", "f8e5m2fnuz"}


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of one run of an instruction on one device, what it calls included (loops excepted)."""
    if instruction.opcode == "dot":
        left = operand(computation, instruction, 0)
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = [int(d) for d in found[1].split(",") if d] if found else []
        return 2.0 * instruction.arrays[0].size * math.prod(left.shape[d] for d in dims)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call" and '"__cublas$' in instruction.attributes:
        return _gemm(computation, instruction)
    if instruction.opcode == "custom-call" and re.search(OWN_KERNELS, instruction.op_name or ""):
        return _logits(computation, instruction)
    if instruction.opcode in ("fusion", "call", "async-start", "call-start"):
        return sum(
            instruction_flops(module, module.computations[name], inner)
            for _, name in instruction.called
            for inner in module.computations[name].instructions.values()
        )
    return 0.0


# Of losses/fused.py. Whatever the program it became, its first and last matrices are features.
OWN_KERNELS = r"/contrastive_(sums|weights)(/|$)"


def _logits(computation: Computation, instruction: Instruction) -> float:
    """A tile of logits: every row of features with every other side's."""
    sides = [operand(computation, instruction, i) for i in range(len(instruction.operands))]
    rows, columns = (side.shape for side in sides if len(side.shape) == 2)
    return 2.0 * rows[0] * columns[0] * rows[1]


def operand(computation: Computation, instruction: Instruction, index: int) -> Array:
    """The first array of an operand."""
    return computation.instructions[instruction.operands[index]].arrays[0]


def _gemm(computation: Computation, instruction: Instruction) -> float:
    """A product by cuBLAS or cuBLASLt: 2 m n k.

    Operands and result have (m k)(k n)(m n) elements. Batch dimensions b enter all three, so the
    product is 2 sqrt(left x right x result / b).
    """
    left, right = (operand(computation, instruction, i) for i in (0, 1))
    found = re.search(r'"lhs_batch_dimensions":\[([^\]]*)\]', instruction.config)
    dims = [int(d.strip('"')) for d in found[1].split(",") if d] if found else []
    batch = math.prod(left.shape[d] for d in dims)
    return 2.0 * math.sqrt(left.size * right.size * instruction.arrays[0].size / batch)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """2 x outputs x input features x kernel taps that meet an input.

    The TPU compiler writes batched products as convolutions with holes (``lhs_dilate``), of whose
    taps only one per output meets a number: taps must be counted, not multiplied.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise HloError(f"{instruction.name}: a convolution without dim_labels")
    lhs, rhs, out = labels[1], labels[2], labels[3]
    left, right = (operand(computation, instruction, i) for i in (0, 1))
    result = instruction.arrays[0]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    parts = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    flops = 2.0 * result.shape[out.index("b")] * result.shape[out.index("f")]
    flops *= right.shape[rhs.index("i")]
    spatial = sorted(set(lhs) - set("bf"))
    for place, label in enumerate(spatial):
        flops *= _taps(
            left.shape[lhs.index(label)],
            right.shape[rhs.index(label)],
            result.shape[out.index(label)],
            *(_entry(parts, key, place, d) for key, d in
              (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1))),
            _low_padding(parts, place),
        )  # fmt: skip
    return flops


def _entry(parts: dict[str, str], key: str, place: int, default: int) -> int:
    return int(parts[key].split("x")[place]) if key in parts else default


def _low_padding(parts: dict[str, str], place: int) -> int:
    return int(parts["pad"].split("x")[place].split("_")[0]) if "pad" in parts else 0


@functools.lru_cache(maxsize=4096)
def _taps(size: int, window: int, outputs: int, stride: int, hole: int, spread: int, pad: int):
    """Pairs of (output, kernel tap) that meet an input along one dimension."""
    reach, outs, met = (size - 1) * hole + 1, np.arange(outputs) * stride - pad, 0
    for tap in range(window):
        at = outs + tap * spread
        met += int(((at >= 0) & (at < reach) & (at % hole == 0)).sum())
    return met
