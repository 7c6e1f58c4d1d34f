"""Lane: what one reader of a stream reads, pass after pass without an end.

Each pass deals the parts of a source out to the lanes anew, so that every record belongs to exactly
one of them, and mixes the records of a lane among the next `buffer` ones. Sources of a mixture take
turns in their proportions. All of it follows from the seed and from how far a lane has come in each
source, three numbers that travel with every batch: a run that goes on puts them back, passes over
the records it has had without reading them, and has the same batches as an unbroken one.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np

from train.data.collate import BAD, PLACES
from train.data.encode import Encoder
from train.data.images import ImageOpener
from train.data.sample import BadSample, LostSource
from train.data.shards import Part, Raw, Ticket

Source = Sequence[tuple[Part, ImageOpener]]
AFTER = "after"
"""Key of a sample's lane places once it has been drawn."""
OPEN = 4
"""Parts read in turn, so that neighbours in a file are none in training."""
IN_A_ROW = 1000
"""Bad samples without a good one between them at which a lane gives up."""


@dataclass
class Place:
    """How far a lane has come in a source."""

    passes: int = 0
    """Passes over its parts that are done."""
    records: int = 0
    """Records it has had of the pass that is on."""
    drawn: int = 0
    """Good samples so far, of all passes."""

    def to_list(self) -> list[int]:
        return [self.passes, self.records, self.drawn]


@dataclass(frozen=True)
class Order:
    """What all lanes agree on.

    Args:
        lanes: readers, over all processes.
        seed: of the order.
        buffer: records among which the next one is drawn.
        weights: of the sources.
    """

    lanes: int
    seed: int
    buffer: int
    weights: tuple[float, ...]


class Lane:
    """Encoded samples of one reader.

    Args:
        sources: what is read.
        encoder: turns a sample into tensors.
        order: of all lanes.
        number: which of them this is.
        places: how far it has come in each source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        order: Order,
        number: int,
        places: Sequence[Sequence[int]],
    ) -> None:
        self.sources, self.encoder, self.order, self.number = sources, encoder, order, number
        self.places = [Place(*place) for place in places]

    def samples(self) -> Iterator[dict[str, Any]]:
        """Without an end; only `bad` comes, as the last, where it cannot go on."""
        streams = [self._records(i) for i in range(len(self.sources))]
        bad: list[tuple[int, str, str]] = []
        while len(bad) < IN_A_ROW:
            which = self._next_source()
            try:
                raw, opener = next(streams[which])
                encoded = self.encoder(raw.sample(), opener)
            except LostSource as error:
                yield {BAD: [(0, "data.train", str(error))]}
                return
            except BadSample as error:
                bad.append((zlib.crc32(raw.where.encode()), raw.where, str(error)))
            else:
                self.places[which].drawn += 1
                after = [place.to_list() for place in self.places]
                yield {**encoded, BAD: bad, PLACES: raw.where, AFTER: after}
                bad = []
        yield {BAD: bad}

    def _next_source(self) -> int:
        """The one whose next sample is due first."""
        due = [
            (place.drawn + 1) / weight
            for place, weight in zip(self.places, self.order.weights, strict=True)
        ]
        return due.index(min(due))

    def _records(self, which: int) -> Iterator[tuple[Raw, ImageOpener]]:
        place = self.places[which]
        while True:
            for found in self._pass(which, place.passes, place.records):
                place.records += 1
                yield found
            if not place.records:
                raise LostSource(
                    f"data.workers: reader {self.number + 1} of {self.order.lanes} finds no record "
                    f"in entry {which + 1} of data.train, which holds too few; use fewer workers, "
                    "or no data.streaming"
                )
            place.passes, place.records = place.passes + 1, 0

    def _pass(self, which: int, number: int, done: int) -> Iterator[tuple[Raw, ImageOpener]]:
        """The records of one pass from number `done` on: windows, each in an order of its own."""
        order = self.order
        source = self.sources[which]
        dealt = np.random.default_rng((order.seed, which, number)).permutation(len(source))
        tickets = in_turn([source[i] for i in dealt[self.number :: order.lanes]])
        window, skip = divmod(done, order.buffer)
        for _ in islice(tickets, window * order.buffer):
            pass  # a ticket that is not called reads nothing
        for i in count(window):
            held = [(ticket(), opener) for ticket, opener in islice(tickets, order.buffer)]
            if not held:
                return
            rng = np.random.default_rng((order.seed, which, number, self.number, i))
            for j in rng.permutation(len(held))[skip:]:
                yield held[j]
            skip = 0


def in_turn(parts: Source) -> Iterator[tuple[Ticket, ImageOpener]]:
    """The tickets of several parts at a time, one of each after the other."""
    waiting = iter(parts)
    tickets = deque((part.tickets(), opener) for part, opener in islice(waiting, OPEN))
    while tickets:
        part_tickets, opener = tickets.popleft()
        ticket = next(part_tickets, None)
        if ticket is not None:
            yield ticket, opener
            tickets.append((part_tickets, opener))
        else:
            tickets.extend((part.tickets(), opener) for part, opener in islice(waiting, 1))
