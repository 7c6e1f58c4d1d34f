"""QueCC's compressor: a grid of queries that knows the question, each looking at its own block.

After arXiv 2411.03312. Module and parameter names are the published ones, so published weights
load. Tokens arrive sorted into blocks of k x k (`grids.block_order`), and what the publication does
on whole grids is done block by block: its depth-wise convolution has stride = kernel, and each
query attends to its own block only. So images of any grids mix in one batch.
Legend: n images, V their tokens, B = V / k² blocks, D vision width, L levels, W LLM width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Of the published LayerNorms."""
SHIFT = 4.0
"""From here on GELU is nearly the identity, and bfloat16 still resolves 1/32."""


class BlockAttention(nn.Module):
    """Multi-head attention of one query per block, with `nn.MultiheadAttention`'s parameters.

    Plain arithmetic: fused kernels are limited in how many small problems they take at once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    @torch.no_grad()
    def start_at_the_mean(self) -> None:
        """Values pass unchanged; queries and keys stay random, so all shares are much the same."""
        self.in_proj_weight.chunk(3)[2].copy_(torch.eye(self.out_proj.in_features))
        nn.init.eye_(self.out_proj.weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, D), (B, K, D), (B, K, D) -> (B, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        logits = torch.einsum("bhd,bkhd->bhk", q, k).float() * q.shape[-1] ** -0.5
        share = logits.softmax(-1).to(v.dtype)
        return self.out_proj(torch.einsum("bhk,bkhd->bhd", share, v).flatten(1))


class QuestionCompressor(nn.Module):
    """One token per block of k x k patches, weighted by what the question asks.

    A fresh one returns about the mean of each block's normalised features, so that training starts
    from average pooling; the publication starts from noise.

    Args:
        width: D.
        levels_width: width of the multi-level features, L · D; the last D of them are taken as
            the start's values.
        text_width: W.
        heads: attention heads; must divide D.
        kernel: k.
    """

    def __init__(
        self, width: int, levels_width: int, text_width: int, heads: int, kernel: int
    ) -> None:
        super().__init__()
        self.text_projection = nn.Sequential(
            nn.Linear(text_width, width), nn.LayerNorm(width, eps=EPS)
        )
        self.q_proj = _perceptron(width, width)
        self.k_proj = _perceptron(levels_width, width)
        self.v_proj = _identity_of_the_last(_perceptron(levels_width, width))
        self.clip_attn = BlockAttention(width, heads)
        self.clip_attn.start_at_the_mean()
        self.resize(kernel)

    def resize(self, kernel: int) -> None:
        """A fresh convolution of another kernel; its start is the mean of the block."""
        weight = self.clip_attn.in_proj_weight
        width = weight.shape[1]
        self.kernel = kernel
        self.q_downsample = nn.Conv2d(width, width, kernel, kernel, groups=width).to(weight)
        nn.init.constant_(self.q_downsample.weight, kernel**-2)
        nn.init.zeros_(self.q_downsample.bias)  # type: ignore[arg-type]

    def forward(self, single: Tensor, levels: Tensor, question: Tensor, image: Tensor) -> Tensor:
        """Compresses blocks.

        Args:
            single: (B, k², D) features.
            levels: (B, k², L · D) features of several encoder blocks.
            question: (n, W) state of each image's question; zeros where there is none, and then
                nothing is added to the features.
            image: (B,) whose block it is.

        Returns:
            (B, D).
        """
        asked = question.any(1, keepdim=True)
        text = torch.where(asked, self.text_projection(question), 0.0)
        query = self.q_proj(single + text[image][:, None])
        square = query.transpose(1, 2).unflatten(2, (self.kernel, self.kernel))
        query = self.q_downsample(square).flatten(1)
        return self.clip_attn(query, self.k_proj(levels), self.v_proj(levels))


def _perceptron(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, out), nn.GELU(), nn.Linear(out, out), nn.LayerNorm(out, eps=EPS)
    )


@torch.no_grad()
def _identity_of_the_last(perceptron: nn.Sequential) -> nn.Sequential:
    """Makes it the LayerNorm of the last level: shifted into GELU's linear range and back."""
    into, back = perceptron[0], perceptron[2]
    assert isinstance(into, nn.Linear)
    assert isinstance(back, nn.Linear)
    nn.init.zeros_(into.weight)
    into.weight[:, -back.in_features :].copy_(torch.eye(back.in_features))
    nn.init.constant_(into.bias, SHIFT)
    nn.init.eye_(back.weight)
    nn.init.constant_(back.bias, -SHIFT)
    return perceptron
