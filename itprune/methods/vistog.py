"""`vistog`: learned semantic tokens gather the patches that look like them (VisToG, 2411.17773).

S learned tokens run through the vision encoder beside the patches, which do not see them. After it
every patch joins one semantic token, and the mean of a group, on top of its token, goes on into the
projector. In training the choice is a Gumbel softmax whose forward is hard (straight-through); in
eval() it is the plain maximum.

No code is published. The grouping follows the block the paper builds on (GroupViT): LayerNorms
before the assignment and one head. Ours where nothing is known: groups are divided by their size,
not by size + 1; matrices start as the identity; and the semantic token starts with weight 0 in a
group that has members (`Grouping.residual`; the publication's sum is weight 1), so that training
starts from group means, which a projector trained on features understands.
Legend: n images, S semantic tokens, N patches of the largest image, D vision width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itprune.host import Host
from itprune.maths.attending import pad_rows
from itprune.maths.grids import patch_rows
from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.fixed_size import FixedSize
from itprune.options import check_positive
from itprune.tokens import Images, Kept, fill, spread

PUBLISHED_TOKENS = 64


@dataclass(frozen=True)
class VistogOptions:
    """Options of `vistog`."""

    tokens: int | None = None
    """Semantic tokens, S. null: prune.keep of an image's usual number of tokens (64 without)."""
    temperature: float = 1.0
    """Of the Gumbel softmax in training; lower is nearer to a hard choice."""

    def __post_init__(self) -> None:
        check_positive("prune.tokens", self.tokens)
        if self.temperature <= 0:
            raise ValueError(f"prune.temperature: must be above 0, got {self.temperature}")


class SemanticTokens(nn.Module):
    """The learned tokens; a module, so that sharded weights are gathered when they are asked."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.weight, std=width**-0.5)  # the scale of a class embedding

    def forward(self) -> Tensor:
        """(S, D)."""
        return self.weight.clone()


class Grouping(nn.Module):
    """Assigns patches to semantic tokens and averages them."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        # Without biases a group without patches is exactly its semantic token.
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.residual = nn.Parameter(torch.zeros(width))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.eye_(linear.weight)

    def forward(self, tokens: Tensor, patches: Tensor, filled: Tensor) -> Tensor:
        """(n, S, D), (n, N, D), (n, N) bool -> (n, S, D)."""
        share = self.assign(tokens, patches) * filled[:, None]
        size = share.sum(-1, keepdim=True)
        mean = (share.to(patches.dtype) @ self.value(patches)) / size.clamp(min=1).to(patches.dtype)
        own = torch.where(size > 0.5, tokens * self.residual, tokens)
        return own + self.out(mean)

    def assign(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """(n, S, N) float32 with a single 1 for each patch; soft in the backward of training."""
        query, key = self.query(self.norm_tokens(tokens)), self.key(self.norm_patches(patches))
        logits = (query @ key.transpose(1, 2)).float() * tokens.shape[-1] ** -0.5
        if self.training:
            gumbel = -torch.empty_like(logits).exponential_().log()
            logits = (logits + gumbel) / self.temperature
        hard = F.one_hot(logits.argmax(1), logits.shape[1]).transpose(1, 2).to(logits.dtype)
        if not self.training:
            return hard
        soft = logits.softmax(1)
        return hard + (soft - soft.detach())


@register_method("vistog")
class Vistog(FixedSize):
    """Semantic tokens inside the encoder, one grouping layer behind it."""

    Options = VistogOptions
    card = Card(
        "learned tokens run through the vision encoder and gather the patches like them",
        paper="2411.17773",
        training="required",
        needs=("grid",),
        notes=(
            "No published code: after the paper's description and GroupViT's block. Ours: groups "
            "are plain means at the start, their semantic token enters with a learned weight from "
            "0 (published: 1), and an empty group is its semantic token."
        ),
    )
    needs_patches = True
    places = ("tower", "before_llm")
    positions = "contiguous"
    size_option = "tokens"

    def __init__(self, options: VistogOptions, host: Host) -> None:
        super().__init__(options, host)
        self.tokens = SemanticTokens(0, host.vision_width)
        self.grouping = Grouping(host.vision_width, options.temperature)
        self.resize(options.tokens or PUBLISHED_TOKENS)

    def vision_blocks(self) -> tuple[int, ...]:
        return ()

    # ------------------------------------------------------------------------------- size
    def size_for(self, keep: float | None) -> int:
        if self.options.tokens is not None:
            return int(self.options.tokens)
        rows, columns = self.host.grid
        usual = rows * columns
        return min(PUBLISHED_TOKENS, usual) if keep is None else max(1, round(keep * usual))

    def resize(self, size: int) -> None:
        self.size = size
        self.tokens = SemanticTokens(size, self.host.vision_width).to(self.tokens.weight)

    def stored_size(self, state: Mapping[str, Tensor], prefix: str) -> int | None:
        tokens = state.get(f"{prefix}tokens.weight")
        return None if tokens is None else len(tokens)

    # ------------------------------------------------------------------------------- grouping
    def tower_tokens(self) -> Tensor:
        return self.tokens()

    def before_llm(self, images: Images) -> Kept:
        """S tokens per image.

        Raises:
            ValueError: an image has fewer slots than there are semantic tokens.
        """
        if images.extra is None:
            raise ValueError(
                "prune.method: vistog needs a vision encoder that takes tokens beside the patches, "
                "and this model's does not"
            )
        if int(images.slots.min()) < self.size:
            raise ValueError(
                f"prune.tokens: {self.size} semantic tokens are more than the "
                f"{int(images.slots.min())} visual tokens of an image; name fewer"
            )
        dtype = self.grouping.residual.dtype
        patches = images.features[patch_rows(images)]
        table, filled = pad_rows(patches.to(dtype), images.grid.prod(1))
        rows = self.grouping(images.extra.to(dtype), table, filled).flatten(0, 1)
        count = torch.full_like(images.slots, self.size)
        return fill(images, spread(images.slots, count), rows.to(patches.dtype))
