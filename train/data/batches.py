"""TokenBatches: as many samples as fit into `data.max_tokens_per_batch` kept tokens.

Pruning makes samples short, so batches become large. They are planned before their samples are
read (`plan.py`), from estimated lengths (`lengths.py`) and the `keep` that will be in force at
their step; all ranks' batches of a step cost nearly the same.

The estimate is refined every `WINDOW` steps from what all ranks have read and kept, and holds from
one window later on: by then every step it is made of has run on every rank, however far its workers
read ahead. So plans depend on neither, and a checkpoint needs the samples that were waiting and two
windows' sums to go on with the very same batches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from train.data.collate import BAD
from train.data.feed import Counts
from train.data.lengths import SCALE, Lengths, Outline, Size, Sums, measure
from train.data.plan import Drawn, Draws, plan_step

WINDOW = 32
"""Steps between two refinements."""
FIRST = 64
"""Samples, spread evenly over the data, that the first estimate is made of."""
FORECAST = 32
"""Steps planned at the start to tell how many an epoch will have."""


class Samples(Protocol):
    """The data set: what a plan needs of it beside the encoded samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def outline(self, index: int) -> Outline:
        """Bytes of its text and number of its images, without opening one."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch in the order they are drawn; always equally many."""
        ...


@dataclass(frozen=True)
class Ranks:
    """How a step is shared out."""

    rank: int = 0
    count: int = 1
    accumulation: int = 1
    """Batches of a rank in a step."""

    @property
    def batches(self) -> int:
        """Batches of a step, over all ranks."""
        return self.count * self.accumulation


@dataclass(frozen=True)
class Budget:
    """What fits into a batch."""

    tokens: int
    """`data.max_tokens_per_batch`."""
    packed: bool
    """Whether pruned rows are packed: a batch costs the sum of its samples then, and else, as rows
    that lose nothing are never packed, its longest for each."""
    keep: Callable[[int, int], float | None]
    """The target in force at a step of so many; always 1.0 in a dense run."""
    steps: int = 0
    """Steps of the whole run; 0: not known yet."""


class TokenBatches:
    """A feed (`train/data/feed.py`) of batches with so many kept tokens.

    Args:
        data: the samples.
        collate: makes a batch of encoded samples.
        visual_ids: placeholders of visual tokens.
        budget: what fits into a batch.
        ranks: how a step is shared out.
        seed: of the order.
        loading: `num_workers` and the like, as DataLoader takes them.

    Raises:
        ValueError: more workers than can be kept busy, or no good sample to estimate lengths from.
    """

    def __init__(
        self,
        data: Samples,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        visual_ids: Sequence[int],
        budget: Budget,
        ranks: Ranks,
        seed: int,
        loading: dict[str, Any],
    ) -> None:
        self.data, self.collate = data, collate
        self.visual_ids = torch.tensor(visual_ids)
        self.budget, self.ranks, self.seed = budget, ranks, seed
        self.steps = budget.steps
        self.loading = _ahead(loading, WINDOW * ranks.accumulation)
        self._first = Sums()
        self._windows: dict[int, Sums] = {}
        """Sums that the plans of a window are made from."""
        self._sums = Sums()
        """Of all ranks, until the last window ended."""
        self._own = Sums()
        """Of this rank, since then."""
        self._counted = (0, 0)
        self._marks: dict[int, dict[str, Any]] = {}
        """Where the draws stood before a step."""
        self._planned: deque[tuple[int, list[Drawn]]] = deque()
        """This rank's batches that have not arrived yet, with their steps."""

    # ---------------------------------------------------------------------------------- estimates
    def estimate(self) -> None:
        """Makes the first estimate, once; every rank reads the same samples for it."""
        if self._first.samples:
            return
        count = min(FIRST, len(self.data))
        problem = ""
        for i in range(count):
            index = i * len(self.data) // count
            sample = self.data[index]
            if sample[BAD]:
                problem = ": ".join(sample[BAD][-1][1:])
                continue
            size = measure(
                sample["input_ids"][None], sample["attention_mask"][None], self.visual_ids
            )
            self._first += Sums.of(self.data.outline(index), size[0])
        if not self._first.samples:
            raise ValueError(f"data.train: none of {count} samples can be used; {problem}")
        self._sums = self._first

    def lengths(self, step: int) -> Lengths:
        """The estimate that plans a step."""
        window = step // WINDOW
        return Lengths.fit(self._first if window < 2 else self._windows[window])

    def forecast(self, epochs: float) -> int:
        """Steps that so many passes over the data will take, about; makes them those of the run."""
        self.estimate()
        draws = self._draws()
        for step in range(FORECAST):  # spread over the run, as a schedule would have it
            self._plan(draws, self.lengths(0), self.budget.keep(step, FORECAST))
        self.steps = max(1, math.ceil(epochs * len(self.data) * FORECAST / draws.given))
        return self.steps

    def keep(self, step: int) -> float | None:
        """The target in force at a step."""
        return self.budget.keep(step, self.steps)

    # ------------------------------------------------------------------------------------- plans
    def plan(self, step: int) -> Iterator[list[Drawn]]:
        """This rank's batches from a step on; marks where each step begins."""
        draws = self._draws()
        if step or self._marks:
            draws.go_to(self._marks[step])
        self._marks[step] = draws.mark()
        while True:
            made = self._plan(draws, self.lengths(step), self.keep(step))
            self._marks[step + 1] = draws.mark()
            for batch in made[self.ranks.rank :: self.ranks.count]:
                self._planned.append((step, batch))
                yield batch
            step += 1

    def _draws(self) -> Draws:
        return Draws(lambda epoch: self.data.order(self.seed, epoch), self.data.outline)

    def _plan(self, draws: Draws, lengths: Lengths, keep: float | None) -> list[list[Drawn]]:
        packed = self.budget.packed and keep != 1.0
        share = lengths.share(keep)
        return plan_step(draws, lengths, share, self.budget.tokens, self.ranks.batches, packed)

    # -------------------------------------------------------------------------------------- Feed
    def batches(self, done: int) -> Iterator[dict[str, Any]]:
        """This rank's batches from number `done` on, which begins a step."""
        self.estimate()
        self._planned.clear()
        plan = self.plan(done // self.ranks.accumulation)
        loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Any], self.data),
            batch_sampler=([drawn.number for drawn in batch] for batch in plan),
            collate_fn=self.collate,
            generator=torch.Generator(),  # leaves the run's own random numbers alone
            **self.loading,
        )
        for batch in loader:
            self._read(batch)
            yield batch

    def _read(self, batch: dict[str, Any]) -> None:
        """Compares a batch with what was expected of it."""
        step, planned = self._planned.popleft()
        if batch[BAD] or "input_ids" not in batch:
            return  # its rows are not those of the plan
        sizes = measure(batch["input_ids"], batch["attention_mask"], self.visual_ids)
        for drawn, size in zip(planned, sizes, strict=True):
            self._own += Sums.of(drawn.outline, size) + self._aim(step, size)

    def _aim(self, step: int, size: Size) -> Sums:
        keep = self.keep(step)
        if keep == 1.0:
            return Sums()
        aimed = size.visual * round(SCALE * (1.0 if keep is None else keep))
        return Sums(pruned=size.visual, aimed=aimed)

    def step(self, steps: int, counts: Counts) -> None:
        self._marks = {step: mark for step, mark in self._marks.items() if step >= steps}
        if steps % WINDOW:
            return
        window = steps // WINDOW
        self._sums += self._gather(counts)
        self._own = Sums()
        self._windows[window + 1] = self._sums
        self._windows = {w: sums for w, sums in self._windows.items() if w >= window}

    def _gather(self, counts: Counts) -> Sums:
        """What all ranks have seen since the last window ended."""
        from accelerate.utils import gather_object

        now = counts()
        layered, kept = (new - old for new, old in zip(now, self._counted, strict=True))
        self._counted = now
        self._own += Sums(layered=layered, kept=kept)
        total = Sums()
        for values in gather_object([self._own.to_list()]):
            total += Sums.from_list(values)
        return total

    def epoch(self, steps: int) -> float:
        mark = self._marks[steps]
        given: int = mark["drawn"] - len(mark["waiting"])
        return given / len(self.data)

    def state_dict(self, counts: Counts) -> dict[str, Any]:
        """The place in the data and the sums; every rank must call it."""
        step = min(self._marks)
        return {
            "step": step,
            **self._marks[step],
            "first": self._first.to_list(),
            "sums": self._sums.to_list(),
            "since": self._gather(counts).to_list(),
            "windows": {str(w): sums.to_list() for w, sums in self._windows.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self._marks = {state["step"]: {name: state[name] for name in ("drawn", "waiting")}}
            self._first = Sums.from_list(state["first"])
            self._sums = Sums.from_list(state["sums"])
            since = Sums.from_list(state["since"])
            windows = {int(w): Sums.from_list(sums) for w, sums in state["windows"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the state of data.max_tokens_per_batch is damaged ({error})"
            ) from None
        self._windows = windows
        self._own = since if self.ranks.rank == 0 else Sums()


def _ahead(loading: dict[str, Any], most: int) -> dict[str, Any]:
    """Keeps workers from reading further ahead than a window."""
    workers = loading["num_workers"]
    if workers > most:
        raise ValueError(
            f"data.workers: {workers} is more than data.max_tokens_per_batch can keep busy; use at "
            f"most {most}"
        )
    if not workers:
        return {**loading, "prefetch_factor": None}
    wanted = loading["prefetch_factor"] or 2
    return {**loading, "prefetch_factor": max(1, min(wanted, most // workers))}
