"""Sparse attention against dense attention under a mask written here, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from itprune.bench.counting import count_flops
from itprune.engine.scene import Raster, Scene, raster
from itprune.engine.sparse import Masked, grouped_attention, masked_attention
from itprune.tokens import Sparsity

HEADS, KV, WIDTH = 6, 3, 8

# A row is a list of parts: an int is that many text tokens, a pair the grid of an image, "cls" a
# visual token on no grid.
ROWS = (
    (3, (5, 4), 6),
    ((2, 7), 2, "cls", (4, 4), 3),
    (9,),
    (1, (6, 6), 1, (3, 2), 2),
)


def facts(rows: tuple, gone: float = 0.0) -> list[list[tuple]]:
    """Each row's tokens as (visual, image, row, column), with a share of the visual ones gone."""
    generator, image, out = torch.Generator().manual_seed(5), 0, []
    for parts in rows:
        tokens: list[tuple] = []
        for part in parts:
            if isinstance(part, int):
                tokens += [(False, -1, -1, -1)] * part
            elif part == "cls":
                tokens.append((True, -1, -1, -1))
            else:
                grid = [(True, image, r, c) for r in range(part[0]) for c in range(part[1])]
                stays = torch.rand(len(grid), generator=generator) >= gone
                tokens += [t for t, s in zip(grid, stays, strict=True) if s]
                image += 1
        out.append(tokens)
    return out


def allowed(tokens: list[tuple], window: int | None) -> Tensor:
    """(n, n) bool: the definition."""
    table = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (_, image, row, column) in enumerate(tokens):
        for k, (_, other, r, c) in enumerate(tokens):
            if window is not None and image >= 0 and image == other:
                table[q, k] = max(abs(row - r), abs(column - c)) <= window // 2
            else:
                table[q, k] = k <= q
    return table


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, visual: Tensor, spare: Sparsity) -> Tensor:
    """(H, n, d) one row: the definition, with explicit weights."""
    k, v = (t.repeat_interleave(HEADS // KV, 0) for t in (k, v))
    heads = torch.ones(HEADS, dtype=torch.bool) if spare.heads is None else spare.heads
    treats = heads & torch.tensor(not spare.blind)
    logits = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
    if spare.zero_after_softmax:
        weight = logits.masked_fill(~seen, -math.inf).softmax(-1)
        weight = weight * (treats[:, None, None] | ~visual)
        return weight @ v * (heads[:, None, None] | ~visual[:, None])
    seen = seen & (treats[:, None, None] | ~visual)
    weight = logits.masked_fill(~seen, -1e30).softmax(-1)
    return weight @ v * (treats[:, None, None] | ~visual[:, None])


def layout(rows: list[list[tuple]], kind: str) -> tuple[Scene, tuple[int, int]]:
    """A scene of the rows in a physical layout, and (B, L)."""
    longest = max(map(len, rows)) + 2
    place, sample, flat = [], [], [t for tokens in rows for t in tokens]
    for b, tokens in enumerate(rows):
        shift = {"packed": sum(map(len, rows[:b])), "right": b * longest}.get(
            kind, (b + 1) * longest - len(tokens)
        )
        place += range(shift, shift + len(tokens))
        sample += [b] * len(tokens)
    columns = [torch.tensor(column) for column in zip(*flat, strict=True)]
    scene = Scene(
        place=torch.tensor(place),
        sample=torch.tensor(sample),
        samples=len(rows),
        visual=columns[0],
        raster=Raster(*columns[1:]),
    )
    return scene, (1, len(flat)) if kind == "packed" else (len(rows), longest)


def inputs(shape: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    heads = (HEADS, KV, KV)
    return [
        torch.randn(shape[0], h, shape[1], WIDTH, generator=generator, requires_grad=True)
        for h in heads
    ]


MIXED = torch.tensor([True, False, True, True, False, False])
SPARES = {
    "window": Sparsity(window=3),
    "wide": Sparsity(window=9),
    "heads": Sparsity(heads=MIXED),
    "window and heads": Sparsity(window=5, heads=MIXED),
    "blind": Sparsity(window=5, blind=True),
    "zero": Sparsity(window=5, heads=MIXED, zero_after_softmax=True),
    "zero, no window": Sparsity(heads=MIXED, zero_after_softmax=True),
    "zero, blind": Sparsity(window=3, heads=MIXED, zero_after_softmax=True, blind=True),
}


@pytest.mark.parametrize("gone", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["packed", "right", "left"])
@pytest.mark.parametrize("spare", SPARES.values(), ids=SPARES)
def test_groups_equal_the_definition(spare: Sparsity, kind: str, gone: float) -> None:
    rows = facts(ROWS, gone)
    scene, shape = layout(rows, kind)
    found = inputs(shape)
    seeing = scene.everything if spare.window is None else scene.windowed(spare.window)
    out = grouped_attention(*found, scene, spare, seeing, WIDTH**-0.5)
    out = out.flatten(0, 1)[scene.place]  # (N, H, d)

    copies = inputs(shape)
    q, k, v = (t.transpose(1, 2).flatten(0, 1)[scene.place].transpose(0, 1) for t in copies)
    parts = []
    for b, tokens in enumerate(rows):
        at = scene.sample == b
        seen = allowed(tokens, spare.window)
        parts.append(dense(q[:, at], k[:, at], v[:, at], seen, scene.visual[at], spare))
    expected = torch.cat(parts, 1).transpose(0, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(found, copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("spare", SPARES.values(), ids=SPARES)
def test_masks_equal_the_definition(spare: Sparsity, kind: torch.dtype) -> None:
    rows = facts((ROWS[0],))
    scene, shape = layout(rows, "packed")
    q, k, v = inputs(shape)
    seen = allowed(rows[0], spare.window)
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -1e38)
    visual = scene.visual[None]
    masked = Masked(mask[None, None], visual, visual)
    out = masked_attention(q, k, v, masked, spare, WIDTH**-0.5)
    expected = dense(q[0], k[0], v[0], seen, visual[0], spare)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_separators_inside_a_grid_are_causal() -> None:
    rows = facts(((2, (4, 3), 2),))
    for at in (11, 8, 5):  # one behind each row of the grid but the last
        rows[0].insert(at, (True, -1, -1, -1))
    scene, shape = layout(rows, "packed")
    q, k, v = inputs(shape)
    spare = Sparsity(window=3)
    out = grouped_attention(q, k, v, scene, spare, scene.windowed(3), WIDTH**-0.5)
    expected = dense(q[0], k[0], v[0], allowed(rows[0], 3), scene.visual, spare)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_window_costs_less_than_causal_attention_over_all() -> None:
    rows = facts(((35, (24, 24), 30),))
    scene, shape = layout(rows, "packed")
    found = [t.detach() for t in inputs(shape)]
    full, heads = Sparsity(), Sparsity(window=5, heads=MIXED)

    def flops(spare: Sparsity) -> int:
        groups = scene.everything if spare.window is None else scene.windowed(spare.window)
        return count_flops(lambda: grouped_attention(*found, scene, spare, groups, 1.0))

    assert flops(Sparsity(window=5)) < 0.4 * flops(full)
    assert flops(heads) < 0.6 * flops(Sparsity(window=5))


def test_a_raster_numbers_images_rows_and_columns() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0]]).bool()
    grid = torch.tensor([[2, 2], [1, 2], [2, 1]])
    found = raster(visual, torch.tensor([4, 3, 2]), grid)
    assert found.image.tolist() == [[-1, 0, 0, 0, 0, -1, -1, -1], [-1, 1, 1, -1, -1, 2, 2, -1]]
    assert found.row.tolist() == [[-1, 0, 0, 1, 1, -1, -1, -1], [-1, 0, 0, -1, -1, 0, 1, -1]]
    assert found.column.tolist() == [[-1, 0, 1, 0, 1, -1, -1, -1], [-1, 0, 1, -1, -1, 0, 0, -1]]
    with pytest.raises(ValueError, match=r"^prune\.window: the sequence has 9 visual tokens"):
        raster(visual, torch.tensor([4, 4, 4]), grid)
