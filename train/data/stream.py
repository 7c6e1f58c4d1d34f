"""StreamFeed: batches of data that is read from front to end (`data.streaming`).

Nothing is indexed or held but the records that are being mixed. Every worker of every process is a
reader with a lane of its own (`lane.py`); a DataLoader takes their batches in turn. A batch brings
along where its lane stands, so the state in a checkpoint is that of the batches trained on, however
far the workers have read ahead. It belongs to this number of processes and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train.data.collate import BAD, PLACES, Collator
from train.data.dataset import SampleDataset, image_opener, read_records
from train.data.encode import Encoder
from train.data.feed import Counts
from train.data.formats import files_of, kind_of
from train.data.hub import open_stream
from train.data.images import ImageOpener
from train.data.lane import AFTER, Lane, Order, Source, in_turn
from train.data.sample import LostSource, Sample
from train.data.shards import GzipPart, Part, Raw, lines_parts, records_parts, rows_parts, turns
from train.data.tar import row_sample, tar_parts
from train.data.workers import start_worker
from train.recipe.sections import DataSection

LANE = "lane"
"""Key of a batch's reader and of where it stands after the batch."""

Grouping = Callable[[Iterator[dict[str, Any]]], Iterator[list[dict[str, Any]]]]
"""Divides encoded samples into batches, their order kept; one with only `bad` is a batch alone."""
Places = list[list[int]]


class StreamFeed:
    """The batches of one process.

    Args:
        sources: what is read.
        encoder: turns a sample into tensors.
        collator: makes batches.
        group: divides samples into batches.
        order: of all lanes.
        rank: of this process.
        readers: of this process.
        options: of its DataLoader, `num_workers` among them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        collator: Collator,
        group: Grouping,
        order: Order,
        rank: int,
        readers: int,
        options: Mapping[str, Any],
    ) -> None:
        self.sources, self.encoder, self.collator, self.group = sources, encoder, collator, group
        self.order, self.rank, self.readers, self.options = order, rank, readers, options
        self.places: list[Places] = [[[0, 0, 0] for _ in sources] for _ in range(readers)]
        self.next = 0
        """The reader whose turn it is."""
        self.seen = 0
        """Samples of the batches handed out, bad ones included."""

    def batches(self, done: int) -> Iterator[dict[str, Any]]:
        """Raises ValueError where batches were trained on but no state came back."""
        if done and not any(drawn for lane in self.places for _, _, drawn in lane):
            raise ValueError("data.streaming: the checkpoint does not tell the place in the stream")
        loader = DataLoader(_Batches(self), batch_size=None, collate_fn=_unchanged, **self.options)
        for batch in loader:
            reader, after = batch.pop(LANE)
            if after is not None:
                self.places[reader] = after
            self.next = (reader + 1) % self.readers
            self.seen += len(batch[PLACES]) + len(batch[BAD])
            yield batch

    def lane(self, reader: int) -> Lane:
        """What a reader of this process reads from here on."""
        number = self.rank * self.readers + reader
        return Lane(self.sources, self.encoder, self.order, number, self.places[reader])

    def step(self, steps: int, counts: Counts) -> None:
        """Nothing to learn from it."""

    def epoch(self, steps: int) -> float | None:
        """There are none."""
        return None

    def state_dict(self, counts: Counts | None = None) -> dict[str, Any]:
        """Where the readers of all processes stand."""
        ranks = [self.position()]
        if self.order.lanes > self.readers:
            from accelerate.utils import gather_object

            ranks = gather_object(ranks)
        return {"readers": self.readers, "ranks": ranks}

    def position(self) -> dict[str, Any]:
        """Where this process's readers stand."""
        return {"next": self.next, "seen": self.seen, "places": self.places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other readers."""
        world = self.order.lanes // self.readers
        then = (len(state["ranks"]), state["readers"])
        if then != (world, self.readers):
            raise ValueError(
                f"data.workers: the checkpoint's stream was read by {then[0]} process(es) with "
                f"{then[1]} reader(s) each, now there are {world} with {self.readers}; go on with "
                "as many"
            )
        own = state["ranks"][self.rank]
        self.next, self.seen, self.places = own["next"], own["seen"], own["places"]

    def first(self, number: int) -> SampleDataset:
        """Some samples from the beginning of every source, the same on every rank.

        Raises:
            ValueError: there is none.
        """
        held: dict[ImageOpener, list[Raw]] = {}
        for source in self.sources:
            for ticket, opener in islice(in_turn(source), -(-number // len(self.sources))):
                held.setdefault(opener, []).append(ticket())
        if not held:
            raise ValueError("data.train: the files hold no sample")
        return SampleDataset([(Held(raws), o) for o, raws in held.items()], self.encoder, 1.0)


class Held:
    """Raw records as random access to their samples."""

    def __init__(self, raws: Sequence[Raw]) -> None:
        self.raws = raws

    def __len__(self) -> int:
        return len(self.raws)

    def sample(self, index: int) -> Sample:
        return self.raws[index].sample()

    def where(self, index: int) -> str:
        return self.raws[index].where


class _Batches(IterableDataset[dict[str, Any]]):
    """The batches of the reader that this worker is."""

    def __init__(self, feed: StreamFeed) -> None:
        self.feed = feed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        feed = self.feed
        info = get_worker_info()
        start_worker()
        # Workers are asked in turn from the first on; the reader due next must be the first.
        reader = (feed.next + (info.id if info is not None else 0)) % feed.readers
        for samples in feed.group(feed.lane(reader).samples()):
            after = [sample.pop(AFTER, None) for sample in samples]
            yield {**feed.collator(samples), LANE: (reader, after[-1])}


def build_stream(
    section: DataSection,
    encoder: Encoder,
    collator: Collator,
    group: Grouping,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> StreamFeed:
    """Opens `data.train` as a stream.

    Args:
        section: what is read, and how.
        encoder: turns a sample into tensors.
        collator: makes batches.
        group: divides samples into batches: `fixed(size)`, or by tokens.
        rank: of this process.
        world: processes.
        seed: of the order.
        options: of the DataLoader; `num_workers` is `data.workers` unless named.

    Raises:
        ValueError: files that are missing, unreadable, of an unknown format or empty.
    """
    options = {"num_workers": section.workers, **(options or {})}
    readers = max(options["num_workers"], 1)
    lanes = readers * world
    entries = [entry_parts(name, section, lanes) for name in section.train]
    # Without weights every sample comes once a pass, so all entries are one source.
    sources = entries if section.weights else [[part for entry in entries for part in entry]]
    order = Order(lanes, seed, section.shuffle_buffer, section.weights or (1.0,))
    feed = StreamFeed(sources, encoder, collator, group, order, rank, readers, options)
    try:
        feed.first(len(sources))
    except LostSource as error:
        raise ValueError(str(error)) from None
    return feed


def entry_parts(name: str, section: DataSection, readers: int) -> list[tuple[Part, ImageOpener]]:
    """One entry of `data.train`, cut up, with the openers of its images."""
    files = files_of(name)
    kinds = [kind_of(path, section.format) for path in files]
    if "tar" in kinds:
        if set(kinds) != {"tar"}:
            raise ValueError(f"{name}: tar shards and other files; make them two entries")
        opener = image_opener(files[0], section)
        return [(part, opener) for part in tar_parts(files, readers)]
    parts = []
    for path, kind in zip(files, kinds, strict=True):
        opener = image_opener(path, section)
        parts += [(part, opener) for part in _parts(path, kind, section, readers)]
    return parts


def _parts(path: Path, kind: str, section: DataSection, readers: int) -> Sequence[Part]:
    if kind == "messages":
        return lines_parts(path, readers)
    if kind == "gzip":
        return [GzipPart(path, turn) for turn in turns(readers)]
    rows = open_stream(str(path), section.split) if kind == "dataset" else None
    if rows is not None:
        return rows_parts(str(path), rows, row_sample, readers)
    return records_parts(read_records(str(path), section), readers)


def fixed(size: int) -> Grouping:
    """Batches of so many samples."""
    return partial(_fixed, size=size)


def within(limit: int, cost: Callable[[dict[str, Any]], float], packed: bool) -> Grouping:
    """Batches of as many samples as fit; one that alone is too long stands alone.

    Args:
        limit: of the tokens of a batch.
        cost: tokens of a sample.
        packed: whether a batch costs the sum of its samples, or its longest for each of them.
    """
    return partial(_within, limit=limit, cost=cost, packed=packed)


def _fixed(samples: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for sample in samples:
        if "input_ids" not in sample:  # the reader ends here, and so will the run
            yield [sample]
            return
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []


def _within(
    samples: Iterator[dict[str, Any]],
    limit: int,
    cost: Callable[[dict[str, Any]], float],
    packed: bool,
) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    costs: list[float] = []
    for sample in samples:
        if "input_ids" not in sample:
            yield [sample]
            return
        costs.append(cost(sample))
        if batch and (sum(costs) if packed else max(costs) * len(costs)) > limit:
            yield batch
            batch, costs = [], costs[-1:]
        batch.append(sample)


def _unchanged(batch: Any) -> Any:
    return batch
