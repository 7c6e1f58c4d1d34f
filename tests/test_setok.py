"""Density-peak clustering token by token, and what is made of the clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itprune.maths.attending import Mixer, pad_rows
from itprune.maths.density_peaks import density_peaks
from itprune.maths.grids import sine_positions
from tests.handmade import (
    WIDTH,
    built,
    contents,
    image,
    images_of,
    seeded,
    shaken,
)


def clusters_of_one(x: Tensor, k: int, threshold: float) -> tuple[list[int], list[int]]:
    """Centres and assignment, token by token."""
    distance = ((x[:, None] - x[None]) ** 2).sum(-1).sqrt() / x.shape[1] ** 0.5
    density = (-(distance.sort(1).values[:, :k] ** 2).mean(1)).exp()
    reach, score = distance.amax(1), []
    for i in range(len(x)):
        away = [distance[i, j] if density[j] > density[i] else reach[j] for j in range(len(x))]
        score.append(float(density[i] * min(away)))
    centres = [i for i, s in enumerate(score) if s > threshold]
    return centres, [min(centres, key=lambda c: float(distance[i, c])) for i in range(len(x))]


def test_ragged_images_cluster_as_they_do_alone() -> None:
    rows = [image(9, 9, 0), image(4, 5, 3), image(1, 1, 6)]
    lens = torch.tensor([81, 20, 1])
    table, filled = pad_rows(torch.cat([row["features"] for row in rows]), lens)
    found = density_peaks(table, filled, 8, 0.5, 4)
    for index, row in enumerate(rows[:2]):
        centres, nearest = clusters_of_one(row["features"], 8, 0.5)
        assert found.centre[index].nonzero()[:, 0].tolist() == centres
        assert found.nearest[index, : lens[index]].tolist() == nearest
    assert found.centre[2].nonzero().tolist() == [[0]]
    assert (found.nearest[~filled] == -1).all()
    assert not found.score[~filled].any()


def test_the_fallback_and_the_count_take_the_best_scored() -> None:
    table, filled = pad_rows(torch.cat([image(9, 9, 0)["features"], image(3, 3, 3)["features"]]),
                             torch.tensor([81, 9]))  # fmt: skip
    none_above = density_peaks(table, filled, 8, 1e9, 12)
    assert none_above.centre.sum(1).tolist() == [12, 9]
    counted = density_peaks(table, filled, 8, 0.0, 1, count=torch.tensor([12, 3]))
    assert torch.equal(counted.centre[0], none_above.centre[0])
    assert counted.centre[1].sum() == 3
    low = counted.score[1][counted.centre[1]].min()
    assert (counted.score[1][~counted.centre[1] & filled[1]] <= low).all()


def test_copies_of_a_token_make_one_centre() -> None:
    colours = 4 * seeded(3, WIDTH, seed=0)
    table = colours.repeat_interleave(10, 0)[None]
    found = density_peaks(table, torch.ones(1, 30, dtype=torch.bool), 8, 0.5, 4)
    assert found.centre[0].nonzero()[:, 0].tolist() == [0, 10, 20]
    assert found.nearest[0].tolist() == [0] * 10 + [10] * 10 + [20] * 10


def test_densities_too_small_for_a_float_still_rank() -> None:
    table = 100 * image(9, 9, 0)["features"][None]
    filled = torch.ones(1, 81, dtype=torch.bool)
    found = density_peaks(table, filled, 40, 0.5, 5)
    assert not found.score.any()
    assert found.centre[0].nonzero()[:, 0].tolist() != [0, 1, 2, 3, 4]


def test_tie_noise_is_seeded_and_off_by_default() -> None:
    x = torch.zeros(2, 30, 4)
    filled = torch.arange(30) < torch.tensor([[30], [17]])
    quiet, again, noisy = (
        density_peaks(x, filled, 8, 0.5, 3, count=torch.tensor([3, 3]), seed=seed).centre
        for seed in (None, 5, 5)
    )
    assert torch.equal(again, noisy)
    assert quiet[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    alone = density_peaks(x[1:, :17], filled[1:, :17], 8, 0.5, 3, torch.tensor([3]), seed=5)
    assert torch.equal(alone.centre[0], noisy[1, :17])


def test_setok_starts_at_the_cluster_means() -> None:
    method = built("setok")
    part = image(12, 12, 0)
    place = sine_positions(part["grid"][None], WIDTH)
    filled = torch.ones(1, 144, dtype=torch.bool)
    found = density_peaks((part["features"] + place)[None], filled, 64, 0.55, 64)
    kept = method(images_of(part))
    assert torch.equal(kept.keep, found.centre[0])
    for row, centre in zip(contents(kept), kept.keep.nonzero()[:, 0], strict=True):
        members = part["features"][found.nearest[0] == centre]
        assert torch.allclose(row, members.mean(0), atol=1e-5)


def test_setok_mixes_within_clusters_only() -> None:
    mixer = shaken(Mixer(WIDTH, 2, 2))
    x = seeded(1, 10, WIDTH, seed=0)
    group = torch.tensor([[0, 1, 0, 2, 1, 1, 0, 2, 2, 0]])
    mixed = mixer(x, group[:, :, None] == group[:, None, :])
    for number in range(3):
        own = x[:, group[0] == number]
        alone = mixer(own, torch.ones(1, own.shape[1], own.shape[1], dtype=torch.bool))
        assert torch.allclose(mixed[:, group[0] == number], alone, atol=1e-5)


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_setok_meets_a_target(keep: float) -> None:
    kept = built("setok", keep)(images_of(image(12, 12, 0), image(6, 10, 3)))
    assert [int(kept.keep[:144].sum()), int(kept.keep[144:].sum())] == [
        round(144 * keep),
        round(60 * keep),
    ]


def test_setok_mixes_grids_and_chooses_the_same_in_training() -> None:
    method = shaken(built("setok"))
    parts = [image(12, 12, 0), image(6, 10, 3), image(2, 3, 6)]
    together = method(images_of(*parts))
    alone = [method(images_of(part)) for part in parts]
    assert torch.equal(together.keep, torch.cat([one.keep for one in alone]))
    expected = torch.cat([contents(one) for one in alone])
    assert torch.allclose(contents(together), expected, atol=1e-5)
    trained = method.train()(images_of(*parts))
    assert torch.equal(trained.keep, together.keep)
    assert torch.equal(contents(trained), contents(together))


def test_sine_positions_are_the_usual_ones() -> None:
    place = sine_positions(torch.tensor([[2, 3]]), 8)
    row, column = 1, 2
    expected = [f(p * 10000 ** (-i / 4)) for p in (row, column) for i in (0, 2)
                for f in (torch.sin, torch.cos) for p in [torch.tensor(float(p))]]  # fmt: skip
    assert torch.allclose(place[row * 3 + column], torch.stack(expected), atol=1e-6)
