"""Core: the line before the model, and the batch behind it, turn by turn on one thread.

A turn admits the first of the line, and those behind it that ask for the same pruner, as far as
they fit; runs their prompts; and gives every row under way one more token. Prompts that the model
pads, since nothing is dropped or its decoder cannot run packed rows, go with others of about their
length. Who is first in line is never passed by, so nobody waits for ever. What fails concerns
nobody else.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from itprune.answer import Answerer
from itprune.dressing import DENSE, Wardrobe
from itprune.engine.engine import packable
from itprune.families import find_family
from itprune.serving.admission import Admission, Ledger, Need
from itprune.serving.running import Asked, Batch, Event

logger = logging.getLogger(__name__)

FAILED = "the model failed on this question; the log of the server says why"
NO_MEMORY = "the memory of the server does not hold this request at present; ask again later"


@dataclass(frozen=True)
class Setting:
    """A pruner to wear."""

    method: str
    keep: float
    """1.0: nothing is pruned, whatever the method."""


@dataclass(eq=False)
class Ticket:
    """A request in the line or under way."""

    asked: Asked
    setting: Setting
    need: Need = field(init=False)


@dataclass(frozen=True)
class Failed:
    """The end of a request that gets no answer, or no more of it."""

    ticket: Ticket
    sentence: str


@dataclass(frozen=True)
class Told:
    """One more token for a request."""

    ticket: Ticket
    event: Event


class Core:
    """Answers many requests together.

    Not for several threads, except that `waiting`, `running` and `kv_bytes` may be read by any.

    Args:
        answerer: of the model; what its `loaded.attached` is changes with the requests.
        limits: of the running batch.
    """

    def __init__(self, answerer: Answerer, limits: Admission) -> None:
        self.answerer = answerer
        self.batch = Batch(answerer)
        self.ledger = Ledger(answerer.text_config, answerer.model.dtype, limits)
        self._wardrobe = Wardrobe(answerer.loaded)
        attached = answerer.loaded.attached
        self._packs = packable(find_family(answerer.model)) if attached is None else attached.packs
        self._worn: Setting | None = None
        self._line: deque[Ticket] = deque()
        self._tickets: dict[Asked, Ticket] = {}

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Rows under way."""
        return len(self.batch.rows)

    @property
    def kv_bytes(self) -> int:
        """What their caches take."""
        return self.batch.kv_bytes

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._line or self.batch.rows)

    def close(self) -> None:
        """Ends everything; the model is given back without hooks of ours."""
        self._line.clear()
        self._tickets.clear()
        self.batch.close()

    # ------------------------------------------------------------------------ requests
    def submit(self, asked: Asked, setting: Setting) -> Ticket:
        """Puts a request at the end of the line.

        Raises:
            ValueError: it takes more memory than there will ever be.
        """
        ids = asked.encoded.inputs["input_ids"]
        visual = int(torch.isin(ids, self.answerer.visual_ids).sum())
        ticket = Ticket(asked, setting)
        ticket.need = Need.of(len(ids), visual, setting.keep, self.batch.room(asked))
        self.ledger.check(ticket.need)
        self._line.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any more: it leaves the line, or the batch."""
        if ticket in self._line:
            self._line.remove(ticket)
        elif self._tickets.pop(ticket.asked, None) is not None:
            self.batch.cancel([row for row in self.batch.rows if row.asked is ticket.asked])

    # ------------------------------------------------------------------------ turns
    def turn(self) -> list[Told | Failed]:
        """Admits who fits, and gives every row one more token."""
        told = self._admit()
        if self.batch.rows:
            told += self._step()
        return told

    def _admit(self) -> list[Told | Failed]:
        group = self._next()
        if not group:
            return []
        _, sentence = self._try(partial(self._wear, group[0].setting))
        if sentence:
            return [Failed(ticket, sentence) for ticket in group]
        return self._prompts(group)

    def _next(self) -> list[Ticket]:
        """Takes out of the line who comes now: all of one setting, the first of the line first."""
        group: list[Ticket] = []
        if not self._line:
            return group
        setting, claim = self._line[0].setting, self.ledger.claim(self.batch)
        packs = self._packs and setting.keep < DENSE
        for ticket in self._line:
            if ticket.setting != setting or not (packs or claim.suits(ticket.need)):
                continue
            if not claim.take(ticket.need):
                break
            group.append(ticket)
        for ticket in group:
            self._line.remove(ticket)
        return group

    def _wear(self, setting: Setting) -> None:
        """Dresses the model.

        Raises:
            ValueError: the method does not fit it, or not this budget.
        """
        if setting == self._worn:
            return
        self._worn = None
        attached = self.answerer.loaded.attached
        if setting.keep == DENSE:
            self._wardrobe.dense()
        elif attached is None or attached.config.method != setting.method:
            self._wardrobe.method(setting.method, setting.keep)
        else:
            self._wardrobe.keep(setting.keep)
        self._worn = setting

    def _prompts(self, group: Sequence[Ticket]) -> list[Told | Failed]:
        """Runs prompts together; where that fails, one by one."""
        for ticket in group:
            self._tickets[ticket.asked] = ticket
        told, sentence = self._try(lambda: self.batch.add([ticket.asked for ticket in group]))
        if not sentence:
            return told
        if len(group) > 1:
            return [told for ticket in group for told in self._prompts([ticket])]
        del self._tickets[group[0].asked]
        return [Failed(group[0], sentence)]

    def _step(self) -> list[Told | Failed]:
        told, sentence = self._try(self.batch.step)
        if not sentence:
            return told
        # Space for one more token may be had without the last to come; other failures are bugs.
        gone = self.batch.rows[-1:] if sentence == NO_MEMORY else list(self.batch.rows)
        self.batch.cancel(gone)
        return [Failed(self._tickets.pop(row.asked), sentence) for row in gone]

    def _try(self, work: Callable[[], Sequence[Event] | None]) -> tuple[list[Told | Failed], str]:
        """What the model says; or one sentence on why it cannot."""
        try:
            return [self._told(event) for event in work() or ()], ""
        except torch.OutOfMemoryError:
            return [], NO_MEMORY
        except Exception as error:  # whatever one request does, the next one is served
            sentence = str(error).partition("\n")[0] if isinstance(error, ValueError) else ""
            if not sentence:
                logger.exception("the model failed")
            return [], sentence or FAILED

    def _told(self, event: Event) -> Told:
        asked = event.row.asked
        ticket = self._tickets[asked] if event.finish is None else self._tickets.pop(asked)
        return Told(ticket, event)
