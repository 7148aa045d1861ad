# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses of PyTorch users on one card: value and gradients, beside gpu_loss.py's.

``whole``: the matrix of all logits (open_clip's loss of one device). ``local``: what one of
``ranks`` devices does in open_clip's local loss, its rows of both directions against the gathered
features; the gathering itself is left out. ``rows``: the same for every rank in turn, each
checkpointed, which is the short way to a batch whose logits do not fit; 8 products where 3 must be.
``tiles``: both passes written by hand, logits made twice and never kept (Inf-CL's order of work;
4 products): the hardest to write and the one to beat.

The FLOPs of a row are those of the three products that any form has to do for the pairs it covers.
"""

import torch
from gpu_clock import measure
from gpu_loss import DIM, PRODUCTS, TINY_DIM, TINY_PAIRS, TINY_TILE
from gpu_torch_model import contrast
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Arrays = tuple[torch.Tensor, ...]


def local(
    image: torch.Tensor, text: torch.Tensor, images: torch.Tensor, texts: torch.Tensor,
    scale: torch.Tensor, targets: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Sum of both cross-entropies of some rows against all of the other side.

    Args:
        image: unit rows of one rank or block [rows, dim].
        text: unit rows of it [rows, dim].
        images: everyone's [pairs, dim].
        texts: everyone's [pairs, dim].
        scale: log of the factor on the cosines, [].
        targets: where the rows stand among all, [rows].
    """
    total = torch.zeros((), device=image.device)
    for ours, theirs in ((image, texts), (text, images)):
        logits = scale.exp() * ours @ theirs.T
        total = total + functional.cross_entropy(logits, targets, reduction="sum")
    return total


def by_rows(
    part, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, tile: int
) -> torch.Tensor:
    """The whole loss as a sum of ``local`` over blocks, each made again in the backward pass."""
    total = torch.zeros((), device=image.device)
    places = torch.arange(len(image), device=image.device)
    for block in zip(image.split(tile), text.split(tile), places.split(tile), strict=True):
        own_image, own_text, own = block
        total = total + checkpoint(
            part, own_image, own_text, image, text, scale, own, use_reentrant=False
        )
    return total / (2 * len(image))


def sums(rows: torch.Tensor, text: torch.Tensor, factor: torch.Tensor) -> Arrays:
    """Log-sums of a block of logits, by rows and by columns."""
    logits = factor * (rows @ text.T).float()
    return logits.logsumexp(1), logits.logsumexp(0)


def slopes(
    rows: torch.Tensor, text: torch.Tensor, factor: torch.Tensor, by_row: torch.Tensor,
    by_column: torch.Tensor,
) -> Arrays:  # fmt: skip
    """Gradients through a block's softmaxes: of its rows, of all columns, of the log factor."""
    logits = factor * (rows @ text.T).float()
    shares = (logits - by_row[:, None]).exp() + (logits - by_column).exp()
    slope = (factor * shares).to(rows.dtype)
    return slope @ text, slope.T @ rows, (shares * logits).sum()


@torch.no_grad()
def by_tiles(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, tile: int,
    dtype: torch.dtype = torch.bfloat16, of_sums=sums, of_slopes=slopes,
) -> tuple[torch.Tensor, Arrays]:  # fmt: skip
    """The loss and its gradients by hand; no more than ``tile`` rows of logits at a time.

    Args:
        image: unit rows [pairs, dim].
        text: unit rows [pairs, dim].
        scale: log of the factor on the cosines, [].
        tile: rows of a block; divides the pairs.
        dtype: of the products.
        of_sums: ``sums``, compiled or not.
        of_slopes: ``slopes``, compiled or not.
    """
    pairs, factor = len(image), scale.exp()
    a, b = image.to(dtype), text.to(dtype)
    blocks = a.split(tile)
    by_column = torch.full((pairs,), -torch.inf, device=image.device)
    by_row = []
    for rows in blocks:
        across, down = of_sums(rows, b, factor)
        by_row.append(across)
        by_column = torch.logaddexp(by_column, down)
    own = factor * (a.float() * b.float()).sum(1)
    loss = (torch.cat(by_row) + by_column - 2 * own).sum() / (2 * pairs)
    of_image, of_text = torch.empty_like(image), torch.zeros_like(text)
    of_scale = -2 * own.sum()
    for i, rows in enumerate(blocks):
        across, down, slope = of_slopes(rows, b, factor, by_row[i], by_column)
        of_image[i * tile : (i + 1) * tile] = across
        of_text += down
        of_scale += slope
    of_image.sub_(2 * factor * b).div_(2 * pairs)
    of_text.sub_(2 * factor * a).div_(2 * pairs)
    return loss, (of_image, of_text, of_scale / (2 * pairs))


def program_of(case: dict, arrays: Arrays, tile: int, device: str, backend: str):
    """() -> (loss, gradients) of a case, compiled where PyTorch can."""
    image, text, scale = arrays
    if case["form"] == "tiles":
        made = [torch.compile(one, dynamic=False, backend=backend) for one in (sums, slopes)]
        return lambda: by_tiles(image, text, scale, tile, torch.bfloat16, *made)
    part = contrast if case["form"] == "whole" else local
    part = torch.compile(part, dynamic=False, backend=backend)

    def call():
        with torch.autocast(device, torch.bfloat16):
            if case["form"] == "rows":
                loss = by_rows(part, image, text, scale, tile)
            elif case["form"] == "local":
                rows = len(image) // case["ranks"]
                own = torch.arange(rows, device=device)
                loss = part(image[:rows], text[:rows], image, text, scale, own) / (2 * rows)
            else:
                loss = part(image, text, scale)
        return loss, torch.autograd.grad(loss, arrays)

    return call


def timed(case: dict, smoke: bool, device: str, backend: str, wait) -> dict:
    """The row of one case; temporaries are what the card held beyond features and gradients."""
    pairs, dim = (TINY_PAIRS, TINY_DIM) if smoke else (case["pairs"], DIM)
    tile = TINY_TILE if smoke else case.get("tile", 4096)
    torch.manual_seed(0)
    sides = [functional.normalize(torch.randn(pairs, dim, device=device), dim=-1) for _ in range(2)]
    arrays = tuple(x.requires_grad_() for x in (*sides, torch.tensor(2.659, device=device)))
    call = program_of(case, arrays, tile, device, backend)
    size = sum(grad.nbytes for grad in call()[1])
    held = memory_now(device)
    loss = float(call()[0].detach())  # a call of its own: in a window the last gradients live on
    space = {"temporaries": max(memory_now(device, most=True) - held - size, 0)}
    found = measure(call, wait, 0.2 if smoke else 1.0)
    found |= space if device == "cuda" else {}
    covered = pairs // case.get("ranks", 1)
    work = PRODUCTS * 2.0 * pairs * covered * dim
    return {"rows": pairs, **found, "loss": loss, "model_flops": work}


def memory_now(device: str, *, most: bool = False) -> int:
    """Bytes that tensors take on a card, or the most since this was last asked; 0 on a CPU."""
    if device != "cuda":
        return 0
    if most:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
