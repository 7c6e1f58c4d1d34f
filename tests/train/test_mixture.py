"""Mixtures: exact proportions, no sample twice before the others, the same order everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from tests.tiny_llava import build_processor
from tests.train.helpers import write_data
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.data.mixture import EpochSampler, Mixture, walk
from train.feeding import EpochCallback
from train.recipe.config import load_recipe
from train.recipe.sections import DataSection

NAMES = ("big", "middle", "small")


def test_each_entry_has_its_share_of_every_epoch() -> None:
    mixture = Mixture((70, 25, 5), (1, 2, 1), NAMES)
    for epoch in range(3):
        order = mixture.order(7, epoch)
        entry = np.searchsorted([70, 95], order, side="right")
        assert Counter(entry.tolist()) == {0: 25, 1: 50, 2: 25}
        assert np.array_equal(order, mixture.order(7, epoch))
    assert not np.array_equal(mixture.order(7, 0), mixture.order(7, 1))
    assert not np.array_equal(mixture.order(7, 0), mixture.order(8, 0))
    thirds = Mixture((10, 10, 10), (1, 1, 2.5), NAMES)
    assert sum(thirds.counts) == 30


def test_no_sample_comes_again_before_all_others_of_its_entry() -> None:
    mixture = Mixture((70, 25, 5), (1, 2, 1), NAMES)
    orders = [mixture.order(0, epoch) for epoch in range(6)]
    drawn = np.concatenate(orders)
    for first, size in ((0, 70), (70, 25), (95, 5)):
        own = drawn[(drawn >= first) & (drawn < first + size)]
        rounds = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(len(set(seen.tolist())) == len(seen) for seen in rounds)
        assert len(rounds) < 2 or not np.array_equal(rounds[0], rounds[1])
    entries = np.searchsorted([70, 95], orders[0], side="right")
    assert len(np.flatnonzero(np.diff(entries))) > 40  # well shuffled, not one behind the other


def test_entries_take_turns_otherwise_in_every_epoch() -> None:
    mixture = Mixture([50, 50], [1, 1], ["a", "b"])
    first, second = (mixture.order(0, epoch) < 50 for epoch in (0, 1))
    assert (first != second).any()


def test_a_walk_goes_on_where_it_stopped() -> None:
    whole = walk(7, 0, 40, (1, 2))
    parts = [walk(7, start, count, (1, 2)) for start, count in ((0, 3), (3, 14), (17, 23))]
    assert np.array_equal(whole, np.concatenate(parts))


def test_a_sampler_follows_the_epoch() -> None:
    mixture = Mixture((6, 4), (1, 1), NAMES[:2])
    sampler = EpochSampler(mixture, 3)
    sampler.set_epoch(2)
    assert list(sampler) == mixture.order(3, 2).tolist()
    assert len(sampler) == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_that_goes_on_draws_in_the_order_of_its_epoch(processes: int) -> None:
    mixture = Mixture((20, 20), (1, 3), NAMES[:2])

    def batches(skip: int, epoch: int, done: float) -> list[list[int]]:
        sampler = EpochSampler(mixture, 3)
        loader: Any = DataLoader(range(40), batch_size=4, sampler=sampler)  # type: ignore[arg-type]
        loader = prepare_data_loader(
            loader, num_processes=processes, process_index=0, put_on_device=False
        )
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(epoch)  # as Trainer does, too
        EpochCallback(sampler).on_epoch_begin(None, SimpleNamespace(epoch=done), None)
        return [batch.tolist() for batch in loader]

    assert batches(2, 1, done=1.5) == batches(0, 1, done=0.99999999)[2:]
    assert batches(0, 1, done=1.0) != batches(0, 0, done=0.0)


def test_impossible_proportions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0.001 gives small not one of an epoch's 100 samples"):
        Mixture((70, 25, 5), (1, 1, 0.001), NAMES)
    with pytest.raises(ValueError, match="small holds no sample to draw"):
        Mixture((70, 25, 0), (1, 1, 1), NAMES)
    text = "model: {path: m}\ndata: {train: [a.json, b.json]}\ntrainer: {output_dir: o}\n"
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for weights, sentence in (("[1, 0]", "must be above 0, got 0"), ("[1]", "got 1 for 2")):
        with pytest.raises(ValueError, match=rf"data.weights: .*{sentence}"):
            load_recipe(path, [f"data.weights={weights}"])


def test_a_mixed_data_set_keeps_places_and_replacements(tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a", 3), write_data(tmp_path / "b", 6, seed=1)
    (tmp_path / "b/images/0.png").unlink()
    section = DataSection(train=(str(first), str(tmp_path / "[b]/*.json")), max_bad=0.5)
    encode = Encoder(build_processor(), 500)
    data = build_dataset(section, section.train, encode, weights=(2, 1))
    order = data.order(0, 0)
    assert sorted(Counter((order >= 3).tolist()).items()) == [(False, 6), (True, 3)]
    assert data.where(3) == f"{second}, record 0"
    assert data[3]["places"] == f"{second}, record 1"
    assert data.outline(3) == (len("What colour?") + len(answer(second, 0)), 1)
    plain = build_dataset(section, section.train, encode)
    assert sorted(plain.order(0, 1).tolist()) == list(range(9))


def answer(path: Path, index: int) -> str:
    return str(json.loads(path.read_text())[index]["conversations"][1]["value"])
