# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's CLIP and SigLIP of near size on the same card, as transformers gives them.

Random weights from a config: nothing is downloaded. bfloat16 autocast, SDPA, ``torch.compile`` of
the layer, fused AdamW, clipped gradients. They are other models than M2 (two towers of unlike
widths, 257 + 77 tokens a pair against 197 + 52), so pairs a second do not compare: utilisation
does, and its FLOPs are counted as everywhere here, matrix products alone, nothing recomputed.
"""

from collections.abc import Callable

import torch
import transformers
from gpu_clock import Rows, measure, rows_for
from gpu_step import TINY_ROWS
from gpu_torch import BACKEND, DEVICE, SECONDS, each, memory, peak, trainer, wait
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer


def tower(width: int, mlp: int, depth: int, heads: int, **more) -> dict:
    """Sizes of one encoder, by the names of its config."""
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
        "num_attention_heads": heads, **more,
    }  # fmt: skip


# The published shapes: CLIP ViT-L/14 (0.43 B), ViT-H/14 (0.99 B), SigLIP so400m/14 (0.88 B).
SIZES = {
    "clip-l14": (
        "CLIPConfig", tower(1024, 4096, 24, 16, patch_size=14), tower(768, 3072, 12, 12),
        {"projection_dim": 768},
    ),
    "clip-h14": (
        "CLIPConfig", tower(1280, 5120, 32, 16, patch_size=14, hidden_act="gelu"),
        tower(1024, 4096, 24, 16, hidden_act="gelu"), {"projection_dim": 1024},
    ),
    "siglip-so400m": (
        "SiglipConfig", tower(1152, 4304, 27, 16, patch_size=14), tower(1152, 4304, 27, 16), {},
    ),
}  # fmt: skip
TINY = tower(64, 128, 2, 2)
TINY_IMAGE = {"image_size": 32, "patch_size": 8}


def config_of(size: str, smoke: bool):
    """The transformers config of one of ``SIZES``, or a tiny one of the same kind."""
    kind, image, text, more = SIZES[size]
    if smoke:
        image, text = {**TINY, **TINY_IMAGE}, {**TINY, "max_position_embeddings": 12}
        more = {key: 32 for key in more}
    return getattr(transformers, kind)(vision_config=image, text_config=text, **more)


class Pair(nn.Module):
    """Both towers and their own loss, on bytes and ids as the other parts have them.

    No padding mask: CLIP's text is causal and read at its end token, so what follows has no part
    in it, and SigLIP is trained on padding as on words.
    """

    def __init__(self, config, attention: str = "sdpa"):
        super().__init__()
        self.model = transformers.AutoModel.from_config(config, attn_implementation=attention)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Bytes [b, 3, h, w] and ids [b, n] -> the loss."""
        found = self.model(input_ids=ids, pixel_values=self.seen(pixels), return_loss=True)
        return found.loss

    @staticmethod
    def seen(pixels: torch.Tensor) -> torch.Tensor:
        """Bytes as numbers from -1 to 1."""
        return (pixels.float() / 255 - 0.5) / 0.5

    def compile_layers(self) -> None:
        """Compiles the layers alone, each kind once."""
        for part in self.modules():
            if isinstance(part, GradientCheckpointingLayer):
                part.compile(dynamic=False, backend=BACKEND)


def inputs(config, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes, and ids that end in the token that CLIP reads its feature at."""
    torch.manual_seed(0)
    side, text = config.vision_config.image_size, config.text_config
    pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, device=device)
    shape = rows, text.max_position_embeddings
    ids = torch.randint(0, min(250, text.vocab_size), shape, device=device)
    ids[:, -1] = min(text.eos_token_id, text.vocab_size - 1)
    return pixels, ids


def products(work: Callable[[], object]) -> float:
    """FLOPs of the matrix products of eager PyTorch, attention written as two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


def step_flops(config, rows: int) -> float:
    """FLOPs of a training step: counted on shapes, without memory, nothing recomputed."""
    with torch.device("meta"):
        made = Pair(config, "eager")
    batch = inputs(config, rows, "meta")
    return products(lambda: made(*batch).backward())


def features(made: Pair, modality: str, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Projected features of one modality, as the model's own methods give them."""
    if modality == "image":
        kind = made.model.dtype
        found = made.model.get_image_features(pixel_values=made.seen(pixels).to(kind))
    else:
        found = made.model.get_text_features(input_ids=ids)
    return found.pooler_output


def peers(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """Every case in turn."""
    each(cases, rows, smoke, {"train": _train, "encode": _encode})


def _train(case: dict, smoke: bool) -> dict:
    config = config_of(case["size"], smoke)
    rows = TINY_ROWS if smoke else rows_for(case, memory())
    with torch.device(DEVICE):
        made = Pair(config)
    made.compile_layers()
    step, batch = trainer(made), inputs(config, rows, DEVICE)
    step(*batch)
    step(*batch)  # the optimiser's own state is made in the first
    found = measure(lambda: step(*batch), wait, 0.2 if smoke else SECONDS)
    return {
        "rows": rows,
        **found,
        **peak(),
        "parameters": sum(p.numel() for p in made.parameters()),
        "loss": float(step(*batch)),
        "model_flops": step_flops(config, rows),
    }


@torch.inference_mode()
def _encode(case: dict, smoke: bool) -> dict:
    config, modality = config_of(case["size"], smoke), case["modality"]
    rows = TINY_ROWS if smoke else rows_for(case, memory())
    with torch.device(DEVICE):
        made = Pair(config).eval().to(torch.bfloat16)
    with torch.device("meta"):
        shapes = Pair(config, "eager").eval()
    made.compile_layers()
    batch, few = inputs(config, rows, DEVICE), inputs(config, 1, "meta")
    features(made, modality, *batch)
    found = measure(lambda: features(made, modality, *batch), wait, 0.1 if smoke else 1.0)
    work = rows * products(lambda: features(shapes, modality, *few))
    return {"rows": rows, **found, **peak(), "model_flops": work}
