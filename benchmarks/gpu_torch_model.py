# SPDX-License-Identifier: Apache-2.0
"""M2-Encoder in PyTorch, written plainly for the benchmark: the same function, a user's choices.

Fused attention, one product for queries, keys and values, ``nn`` layers throughout. The parts that
no contrastive step reads (B weights of the vl layers, pooler) are left out.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

EPS = 1e-5


class Layer(nn.Module):
    """Pre-norm with inner norms, one modality's weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.inner_norm, self.ffn_norm = (
            nn.LayerNorm(width, EPS) for _ in range(3)
        )
        self.mlp_norm = nn.LayerNorm(4 * width, EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[b, n, d] -> [b, n, d]; ``mask`` [b, 1, 1, n] is True at the keys that count."""
        b, n, d = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(self.inner_norm(heads.transpose(1, 2).reshape(b, n, d)))
        return x + self.fc2(self.mlp_norm(functional.gelu(self.fc1(self.ffn_norm(x)))))


class Stack(nn.Module):
    """Layers and their last norm; ``again`` makes each layer's activations anew, backward."""

    def __init__(self, width: int, heads: int, depth: int, again: bool = False):
        super().__init__()
        self.again = again
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[b, n, d] -> [b, n, d]."""
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.again else layer(x, mask)
        return self.norm(x)


class M2(nn.Module):
    """Both towers, their four heads and both scales.

    Args:
        cfg: a resolved ``m2jax.config.Model``.
        stream: precision of what passes from layer to layer. Autocast alone leaves it in float32;
            m2jax has it in bfloat16, which moves half the bytes.
        again: keeps each layer's input alone and computes the layer again, backward.
    """

    def __init__(self, cfg, stream: torch.dtype = torch.float32, again: bool = False):
        super().__init__()
        self.stream = stream
        d, side = cfg.width, cfg.image_size // cfg.patch_size
        self.conv = nn.Conv2d(3, d, cfg.patch_size, cfg.patch_size)
        self.cls = nn.Parameter(torch.zeros(d))
        self.image_positions = nn.Parameter(torch.randn(side * side + 1, d))
        self.table = nn.Embedding(cfg.vocab_size, d)
        self.text_positions = nn.Parameter(torch.randn(cfg.max_text_len, d))
        self.image_backbone = Stack(d, cfg.heads, cfg.backbone_layers, again)
        self.text_backbone = Stack(d, cfg.heads, cfg.backbone_layers, again)
        self.vl = Stack(d, cfg.heads, cfg.vl_layers, again)
        self.image_head, self.text_head, self.image_vl_head, self.text_vl_head = (
            nn.Linear(d, cfg.out_dim, bias=False) for _ in range(4)
        )
        self.scale, self.vl_scale = (nn.Parameter(torch.tensor(2.659)) for _ in range(2))

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes [b, 3, h, w] -> unit rows of the vl layers, and of the backbone."""
        pixels = (pixels.float() / 255 - 0.5) / 0.5
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.image_positions
        x = x.to(self.stream)
        first = self.image_backbone(x)
        return self._features(first, self.vl(first), self.image_vl_head, self.image_head)

    def encode_text(
        self, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [b, n] -> unit rows of the vl layers, and of the backbone."""
        x = ((self.table(ids) + self.text_positions) * mask[..., None]).to(self.stream)
        keys = mask[:, None, None, :]
        first = self.text_backbone(x, keys)
        return self._features(first, self.vl(first, keys), self.text_vl_head, self.text_head)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The contrastive loss on both features, in float32 as the library takes it."""
        image, first_image = self.encode_image(pixels)
        text, first_text = self.encode_text(ids, mask)
        with torch.autocast(pixels.device.type, enabled=False):
            vl = contrast(image, text, self.vl_scale)
            return 0.5 * vl + 0.5 * contrast(first_image, first_text, self.scale)

    @staticmethod
    def _features(
        first: torch.Tensor, last: torch.Tensor, last_head: nn.Module, first_head: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = (last_head(last[:, 0]), first_head(first[:, 0]))
        return tuple(functional.normalize(x.float(), dim=-1) for x in pairs)


def contrast(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of both directions (open_clip's loss on one device)."""
    logits = scale.exp() * image @ text.T
    targets = torch.arange(len(logits), device=logits.device)
    both = functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
    return 0.5 * both
