"""A small vision transformer, and the one whose first attention has nothing beside it.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with a trainable position embedding
and pre-norm blocks.  ``first="plain"`` takes the skip connection and the LayerNorm from around the
first attention, as in structure (A) of Lu et al., "APRIL", CVPR 2022, Fig. 1, which has them
nowhere.  Pixels are not normalized.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedsim.data.dataset import DataSpec
from fedsim.registry import register

Count = Annotated[int, Field(gt=0)]


class Attention(nn.Module):
    """Self-attention with a projection of its own for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        size = (*tokens.shape[:2], self.heads, -1)
        q, k, v = (
            part(tokens).view(size).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        # Written out: the fused kernel has no second derivative.
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a skip connection.

    A plain block's attention has neither.
    """

    def __init__(self, width: int, heads: int, *, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.attention = Attention(width, heads)
        self.norm = nn.Identity() if plain else nn.LayerNorm(width)
        layers = (nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        attended: Tensor = self.attention(self.norm(tokens))
        tokens = attended if self.plain else tokens + attended
        out: Tensor = tokens + self.mlp(tokens)
        return out


class ViT(nn.Module):
    """Patches, a class token, a trainable position embedding ``[T, D]``, blocks, a linear layer."""

    def __init__(
        self,
        spec: DataSpec,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        first: str,
        pool: str,
    ) -> None:
        super().__init__()
        channels, height, across = spec.shape
        self.patch, self.pool = patch, pool
        self.grid = (-(-height // patch), -(-across // patch))
        self.embed = nn.Linear(channels * patch * patch, width)
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(1 + self.grid[0] * self.grid[1], width))
        plain = [first == "plain" and index == 0 for index in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, heads, plain=each) for each in plain))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.num_classes)

    def patches(self, images: Tensor) -> Tensor:
        """Cut ``[B, C, H, W]``, with zeros where a patch is not full, to ``[B, T - 1, C p p]``."""
        down, across = (
            count * self.patch - side
            for count, side in zip(self.grid, images.shape[2:], strict=True)
        )
        padded = functional.pad(images, (0, across, 0, down))
        return functional.unfold(padded, self.patch, stride=self.patch).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to logits ``[B, classes]``."""
        embedded = self.embed(self.patches(images))
        token = self.token.expand(len(images), 1, -1)
        tokens = self.blocks(torch.cat([token, embedded], dim=1) + self.position)
        read = tokens[:, 0] if self.pool == "token" else tokens.mean(dim=1)
        logits: Tensor = self.head(self.norm(read))
        return logits


@register("model", "vit")
def vit(
    spec: DataSpec,
    *,
    patch: Count = 4,
    width: Count = 96,
    depth: Count = 2,
    heads: Count = 3,
    first: Literal["plain", "standard"] = "plain",
    pool: Literal["token", "mean"] = "token",
) -> nn.Module:
    """Build the network; 65 tokens at 32 x 32.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    patch : int
        Side of a patch in pixels.
    width : int
        Of a token; a multiple of ``heads``.
    depth : int
        Blocks.
    heads : int
        Of each attention.
    first : {"plain", "standard"}
        Whether the first attention lacks its skip connection and LayerNorm.
    pool : {"token", "mean"}
        What the last layer reads: the class token, or the mean of all.
    """
    if width % heads:
        raise ValueError(f"width {width} is no multiple of {heads} heads")
    return ViT(spec, patch=patch, width=width, depth=depth, heads=heads, first=first, pool=pool)
