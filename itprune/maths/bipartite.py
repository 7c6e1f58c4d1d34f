"""Bipartite merging: the arithmetic, for a ragged batch of images at once.

One round takes the tokens of an image in their order, calls the even places A and the odd ones B,
lets every a choose its most cosine-similar b and merges the r most similar a's into the b they
chose: the mean over b and all a's that chose it. Rounds of r = half repeat until the next one would
overshoot the wanted count, and a last round takes exactly the rest. After the description of AIM
(arXiv 2412.03248). Two of its habits are switches: the mean forgets how many tokens an earlier
round put into a member (`weighted` remembers), and a round's output is the unmerged a's by falling
similarity, then all b's (`order="raster"` restores raster order after each round).

The choice is made without gradient and yields one row and one weight for each token, so that
the new features are a single weighted sum, which is differentiable.
Legend: V tokens of n images, M the largest image, h = M / 2, K metric width, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.ragged import group_ids, pad_groups

ORDERS = ("published", "raster")


@dataclass(frozen=True)
class Merging:
    """Where each token of a ragged batch goes."""

    keep: Tensor
    """(V,) bool: tokens others were merged into, and those left alone; as many as rows."""
    row: Tensor
    """(V,) output row each token became part of; rows are image after image, in output order."""
    weight: Tensor
    """(V,) float32 share of the token in its row; the shares of a row sum to one."""
    rows: int
    """Number of output rows."""

    def apply(self, features: Tensor) -> Tensor:
        """(V, D) features -> (rows, D) merged ones of the same dtype; differentiable."""
        weighted = features.float() * self.weight[:, None]
        merged = weighted.new_zeros(self.rows, features.shape[1])
        return merged.index_add(0, self.row, weighted).to(features.dtype)


def merges_per_round(lens: Tensor, count: Tensor) -> list[Tensor]:
    """How many tokens each round takes away: half of them, in the last one exactly what is over.

    Args:
        lens: (n,) int64 tokens of each image, on the CPU.
        count: (n,) int64 wanted tokens; below 1 counts as 1.

    Returns:
        One (n,) tensor for each round; zero where an image has reached its count.
    """
    size, rounds = lens, []
    while bool((r := torch.minimum(size // 2, size - count).clamp(min=0)).any()):
        rounds.append(r)
        size = size - r
    return rounds


@torch.no_grad()
def bipartite_merging(
    metric: Tensor,
    lens: Tensor,
    count: Tensor,
    *,
    order: str = "published",
    weighted: bool = False,
) -> Merging:
    """Merges every image down to its count.

    Args:
        metric: (V, K) what similarity is measured on, any float dtype; merged along.
        lens: (n,) int64 tokens of each image.
        count: (n,) int64 tokens wanted of each image, 1..lens.
        order: one of `ORDERS`.
        weighted: means weigh a member by the tokens already merged into it.

    Returns:
        The destination of every token. Costs n M² K / 4 multiplications in the first round, a
        quarter of that in the second, and so on; one synchronisation with the device.
    """
    sizes = lens.cpu()
    rounds = merges_per_round(sizes, count.cpu())
    image, n = group_ids(lens), len(lens)
    index, filled = pad_groups(torch.arange(len(metric), device=metric.device), image, n, 0)
    state = _State(metric[index].float(), _columns(index), filled.float(), lens)
    place = torch.where(filled, state.origin, 0)
    weight = torch.ones_like(state.mass)
    for merges in rounds:
        sizes = sizes - merges
        r = merges.to(lens.device)
        state, moved, share = _round(state, r, int(sizes.max()), order, weighted)
        weight = weight * share.gather(1, place)
        place = torch.where(filled, moved.gather(1, place), 0)
    return _flatten(state, place, weight, filled, int(sizes.sum()))


@dataclass(frozen=True)
class _State:
    """Tables of the tokens there are between two rounds, in their present order."""

    metric: Tensor
    """(n, M, K) float32; pads hold anything finite."""
    origin: Tensor
    """(n, M) place in the image the token had at first."""
    mass: Tensor
    """(n, M) float32 tokens inside it."""
    size: Tensor
    """(n,) tokens of each image."""


def _round(
    state: _State, r: Tensor, width: int, order: str, weighted: bool
) -> tuple[_State, Tensor, Tensor]:
    """One round of `r` (n,) merges, at most half of each image; `width` columns are left.

    Returns:
        The new state, and for each old column (n, M): its new one, its share in what is there.
    """
    state = _even(state)
    (a, b), (mass_a, mass_b) = _halves(state.metric), _halves(state.mass)
    column = torch.arange(a.shape[1], device=a.device)
    odd = state.size // 2
    in_a, in_b = column < (state.size - odd)[:, None], column < odd[:, None]
    rank, chosen = _match(a, b, in_a, in_b)
    merged = in_a & (rank < r[:, None])

    own, other = (mass_a, mass_b.clamp(min=1)) if weighted else (in_a.float(), mass_b.clamp(1, 1))
    total = other.scatter_add(1, chosen, merged * own)
    share_a = torch.where(merged, own / total.gather(1, chosen), 1.0)
    share = _interleave(share_a, other / total)
    mean = (b * (other / total)[..., None]).scatter_add(
        1, chosen[..., None].expand_as(a), a * (merged * share_a)[..., None]
    )
    mass_b = mass_b.scatter_add(1, chosen, merged * mass_a)

    alive = _interleave(in_a & ~merged, in_b)
    moved = _moves(state, alive, rank, r, order)
    new = _State(
        _compact(_interleave(a, mean), alive, moved, width),
        _compact(state.origin, alive, moved, width),
        _compact(_interleave(mass_a, mass_b), alive, moved, width),
        state.size - r,
    )
    stays, joins = _halves(moved)
    moved = _interleave(torch.where(merged, joins.gather(1, chosen), stays), joins)
    return new, moved, share


def _moves(state: _State, alive: Tensor, rank: Tensor, r: Tensor, order: str) -> Tensor:
    """(n, M) new column of each old one that is alive after the round."""
    if order == "raster":
        return _rank(torch.where(alive, state.origin, state.origin.shape[1] + state.origin.max()))
    column = torch.arange(rank.shape[1], device=rank.device)
    behind = (state.size - state.size // 2 - r)[:, None] + column
    ranked = _interleave(rank - r[:, None], behind)
    # An image that has reached its count is left as it is.
    return torch.where(r[:, None] > 0, ranked, _columns(ranked))


def _compact(table: Tensor, alive: Tensor, moved: Tensor, width: int) -> Tensor:
    """(n, M, …) -> (n, width, …) with what is alive in its new column."""
    # The rest is written to a column behind the last, which is then cut off.
    to = torch.where(alive, moved, width)
    to = to.reshape(*to.shape, *[1] * (table.dim() - 2)).expand_as(table)
    room = table.new_zeros(len(table), width + 1, *table.shape[2:])
    return room.scatter(1, to, table)[:, :width]


def _match(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> tuple[Tensor, Tensor]:
    """(n, h) similarity rank of each a among the image's, 0 = closest, and the b it chose."""
    similar = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)
    best, chosen = similar.masked_fill(~in_b[:, None], -torch.inf).max(-1)
    return _rank(best.masked_fill(~in_a, -torch.inf), descending=True), chosen


def _flatten(state: _State, place: Tensor, weight: Tensor, filled: Tensor, rows: int) -> Merging:
    """From tables to the flat ragged answer."""
    start = state.size.cumsum(0) - state.size
    there = torch.arange(state.origin.shape[1], device=place.device) < state.size[:, None]
    # A column behind the last takes what the pads of `origin` point at.
    keep = filled.new_zeros(len(filled), filled.shape[1] + 1)
    keep = keep.scatter(1, torch.where(there, state.origin, filled.shape[1]), True)[:, :-1]
    return Merging(keep[filled], (start[:, None] + place)[filled], weight[filled], rows)


def _even(state: _State) -> _State:
    """With one more column of pads where their number is odd."""
    if state.origin.shape[1] % 2 == 0:
        return state
    return _State(
        F.pad(state.metric, (0, 0, 0, 1)),
        F.pad(state.origin, (0, 1)),
        F.pad(state.mass, (0, 1)),
        state.size,
    )


def _halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2h, …) -> its even and its odd columns."""
    return table[:, 0::2], table[:, 1::2]


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """The reverse of `_halves`."""
    return torch.stack((even, odd), 2).flatten(1, 2)


def _rank(table: Tensor, descending: bool = False) -> Tensor:
    """(n, M) rank of each value in its row; ties go to the earlier column."""
    order = torch.argsort(table, dim=1, descending=descending, stable=True)
    return torch.argsort(order, dim=1)


def _columns(table: Tensor) -> Tensor:
    """(n, M) column numbers."""
    return torch.arange(table.shape[1], device=table.device).expand(table.shape)
