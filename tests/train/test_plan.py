"""Plans of batches: what goes together, for all ranks at once, from estimated lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from train.data.lengths import SCALE, Cost, Lengths, Outline, Size, Sums, measure
from train.data.plan import PATIENCE, Drawn, Draws, Packed, Priced, plan_step

LIMIT = 2000
EXACT = Lengths(2.0, 0.25, 64.0, 1.0, 0.0, 0.0)
COUNT = 3000


def outlines(seed: int = 0) -> list[Outline]:
    """Many short texts and few long ones, some with several images."""
    rng = np.random.default_rng(seed)
    size = np.minimum(rng.lognormal(5, 1.2, COUNT), 9000).astype(int)
    images = np.where(rng.random(COUNT) < 0.1, 5, rng.integers(0, 2, COUNT))
    return [Outline(int(b), int(i)) for b, i in zip(size, images, strict=True)]


def draws(given: list[Outline]) -> Draws:
    return Draws(
        lambda epoch: np.random.default_rng(epoch).permutation(len(given)), given.__getitem__
    )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("batches", [1, 2, 12])
def test_no_batch_is_above_the_limit_and_ranks_have_equal_work(packed: bool, batches: int) -> None:
    stock = draws(outlines())
    spread, filled, singles = [], [], 0
    for _ in range(20):
        plan = plan_step(stock, EXACT, 0.25, LIMIT, batches, packed)
        assert len(plan) == batches
        costs = [[EXACT.cost(one.outline, 0.25).tokens for one in batch] for batch in plan]
        loads = [sum(c) if packed else len(c) * max(c) for c in costs]
        assert all(load <= LIMIT or len(c) == 1 for load, c in zip(loads, costs, strict=True))
        singles += sum(len(c) == 1 for c in costs)
        spread.append(max(loads) / np.mean(loads))
        filled.append(np.mean(loads) / LIMIT)
    assert singles < 20 * batches / 2
    assert np.mean(spread) < (1.05 if packed else 1.15)
    assert np.mean(filled) > (0.9 if packed else 0.6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_every_sample_comes_once_an_epoch_and_none_is_left_behind(packed: bool) -> None:
    given = outlines()
    stock = draws(given)
    seen: list[int] = []
    while stock.epoch < 2:
        oldest = stock.waiting[0].number if stock.waiting else None
        step = [one.number for b in plan_step(stock, EXACT, 0.5, LIMIT, 4, packed) for one in b]
        assert oldest is None or oldest in step
        seen += step
    counts = Counter(seen + [one.number for one in stock.waiting])
    assert set(counts) == set(range(COUNT))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_packed_steps_are_as_mixed_as_the_data() -> None:
    """Taken as they are drawn: no more than a few that did not fit wait for the next step."""
    stock = draws(outlines())
    for step in range(1, 30):
        taken = sum(map(len, plan_step(stock, EXACT, 0.25, LIMIT, 2, packed=True)))
        assert taken > 10
        assert len(stock.waiting) <= PATIENCE, step


def test_padded_batches_hold_samples_of_like_length() -> None:
    stock = draws(outlines())
    waste = []
    for _ in range(20):
        for batch in plan_step(stock, EXACT, 1.0, LIMIT, 2, packed=False):
            lengths = [EXACT.cost(one.outline, 1.0).tokens for one in batch]
            waste.append(1 - sum(lengths) / (len(lengths) * max(lengths)))
    assert np.mean(waste) < 0.3  # two thirds where batches are drawn at random


def test_a_mark_brings_back_the_very_same_plan() -> None:
    given = outlines()[:300]
    for packed in (True, False):
        whole, later = draws(given), draws(given)
        for _ in range(5):
            plan_step(whole, EXACT, 0.5, LIMIT, 3, packed)
        later.go_to(whole.mark())
        for _ in range(10):  # across the end of an epoch
            plans = [plan_step(d, EXACT, 0.5, 8 * LIMIT, 3, packed) for d in (whole, later)]
            assert plans[0] == plans[1]


def test_a_smaller_keep_makes_larger_batches() -> None:
    rows = [Outline(40, 1)] * 500

    def size(keep: float) -> int:
        return len(plan_step(draws(rows), EXACT, EXACT.share(keep), LIMIT, 1, packed=True)[0])

    assert size(0.125) == LIMIT // (12 + 8)
    assert size(0.5) == LIMIT // (12 + 32)


def test_a_line_is_found_and_what_was_kept_is_believed() -> None:
    rng = np.random.default_rng(0)
    sums = Sums()
    for _ in range(200):
        outline = Outline(int(rng.integers(0, 4000)), int(rng.integers(0, 4)))
        size = Size(round(7 + 0.3 * outline.bytes), 50 * outline.images)
        aimed = size.visual * round(0.2 * SCALE)
        sums += Sums.of(outline, size) + Sums(
            pruned=size.visual, aimed=aimed, layered=size.visual * 10, kept=size.visual * 3
        )
    found = Lengths.fit(sums)
    assert found.base == pytest.approx(7, abs=0.1)
    assert found.per_byte == pytest.approx(0.3, abs=1e-4)
    assert found.per_image == pytest.approx(50)
    assert found.share(0.2) == pytest.approx(0.3)
    assert found.share(1.0) == 1.0
    assert found.share(None) <= 1.0
    cost = found.cost(Outline(1000, 2), 0.5)
    assert cost.tokens == pytest.approx(7 + 300 + 50, abs=0.5)
    assert cost.variance < 0.5
    assert Lengths.fit(Sums.from_list(sums.to_list())) == found


def test_sums_do_not_depend_on_who_added_them_up() -> None:
    rows = [Sums.of(Outline(i * i, i % 3), Size(3 * i + i % 5, 17 * (i % 3))) for i in range(90)]
    shares = [sum(rows[k::4], Sums()) for k in range(4)]
    assert sum(shares, Sums()) == sum(rows, Sums())
    assert Lengths.fit(Sums()).cost(Outline(100, 1), 0.5).tokens == 1.0


def test_uncertain_lengths_leave_room() -> None:
    sure, unsure = EXACT, Lengths(2.0, 0.25, 64.0, 1.0, 400.0, 0.0)
    plans = [
        plan_step(draws(outlines()), lengths, 0.25, LIMIT, 1, packed=True)[0]
        for lengths in (sure, unsure)
    ]
    assert len(plans[1]) < len(plans[0])


def test_sizes_are_counted_without_padding() -> None:
    ids = torch.tensor([[1, 9, 9, 2], [3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert measure(ids, mask, torch.tensor([9])) == [Size(2, 2), Size(2, 0)]


def test_the_doubts_about_all_samples_of_a_batch_add_up() -> None:
    batch = Packed(1000)
    doubtful = Cost(tokens=100.0, variance=900.0)  # 30 tokens either way
    while batch.takes(doubtful):
        batch.add(Priced(Drawn(0, Outline(100, 0)), doubtful))
    # 8 samples: 800 + 2 * sqrt(8 * 900) fits into 1000; 9: 900 + 2 * sqrt(9 * 900) does not.
    assert len(batch.samples) == 8
