"""LocalBackend: a model of our own, which answers many requests together.

A thread turns the core; what it is to do comes in as calls, and what was said goes back to the
event loop once a turn. Questions are encoded in another thread, one at a time, since tokenizers
and image processors are not made for several.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from PIL import Image

from itprune.answer import Answerer
from itprune.checkpoint import Loaded
from itprune.config import PruneConfig
from itprune.decoding import Decoding
from itprune.dressing import DENSE
from itprune.methods import methods
from itprune.question import Question
from itprune.serving.admission import Admission
from itprune.serving.backend import Broken, Facts, Gauge, Piece, Request, Unavailable, Usage
from itprune.serving.core import FAILED, NO_MEMORY, Core, Failed, Setting, Ticket, Told
from itprune.serving.running import Asked
from itprune.web.texts import as_texts

logger = logging.getLogger(__name__)

CLOSING = "the server is stopping; ask again later"
DEAD = "the model has failed; the server must be started again"
PROBE = 64
"""Pixels of the picture that methods are tried with."""
Call = Callable[[], None]


class LocalStream:
    """One answer. See `Stream`.

    Args:
        cancel: tells the model that nobody listens.
    """

    def __init__(self, cancel: Callable[[LocalStream], None]) -> None:
        self._cancel = cancel
        self._events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._over = False
        self.ticket: Ticket | None = None
        """For the model's thread alone."""

    def tell(self, event: Piece | Exception) -> None:
        """One more piece, or why there is none. On the event loop."""
        self._events.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Exception):
            self._over = True
            raise event
        self._over = event.finish is not None
        return event

    async def aclose(self) -> None:
        self._over = True
        self._cancel(self)


class LocalBackend:
    """Answers on a loaded model. See `Backend`.

    Args:
        loaded: from `load_pretrained`; its method keeps its options and trained parts.
        name: what clients call the model.
        method: of a request that names none.
        keep: of a request that names none.
        offered: further methods that may be asked for; None: all that fit the model.
        limits: of the running batch.

    Raises:
        ValueError: the model cannot be asked, or one of the methods does not fit it.
    """

    def __init__(
        self,
        loaded: Loaded,
        name: str,
        method: str,
        keep: float,
        offered: Sequence[str] | None,
        limits: Admission,
    ) -> None:
        self._answerer = Answerer(loaded)
        self._core = Core(self._answerer, limits)
        names = (method, *self._fitting(method, keep, offered))
        context: int = self._answerer.text_config.max_position_embeddings
        self._facts = Facts(
            name, context, int(time.time()), tuple(dict.fromkeys(names)), method, keep
        )
        self._streams: dict[Ticket, LocalStream] = {}
        self._inbox: SimpleQueue[Call | None] = SimpleQueue()
        self._encoder = ThreadPoolExecutor(1, "itprune-encode")
        self._thread = threading.Thread(target=self._serve, name="itprune-model", daemon=True)
        self._trouble = ""

    def _fitting(self, own: str, keep: float, offered: Sequence[str] | None) -> list[str]:
        """Those of the methods that can answer here."""
        budget = keep if keep < DENSE else PruneConfig().final_keep or DENSE
        self._probe(own, budget)
        found = []
        for name in methods() if offered is None else offered:
            try:
                self._probe(name, budget)
            except ValueError:
                if offered is not None:
                    raise
            else:
                found.append(name)
        return found

    def _probe(self, method: str, keep: float) -> None:
        """Asks for one token, which also warms the model up.

        Raises:
            ValueError: the method does not fit.
        """
        picture = Image.new("RGB", (PROBE, PROBE))
        encoded = self._answerer.encode(Question.from_prompt("?", [picture]))
        self._core.submit(Asked(encoded, Decoding(max_new_tokens=1)), Setting(method, keep))
        for told in self._core.turn():
            if isinstance(told, Failed):
                raise ValueError(f"method {method!r} cannot be served: {told.sentence}")

    # ------------------------------------------------------------------- on the event loop
    def facts(self) -> Facts:
        return self._facts

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        self._trouble = self._trouble or CLOSING
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def trouble(self) -> str:
        return self._trouble

    def gauges(self) -> Sequence[Gauge]:
        core = self._core
        return (
            Gauge("waiting", "Requests in line for the model", core.waiting),
            Gauge("running", "Requests whose answers are being made", core.running),
            Gauge("kv_bytes", "Memory of their keys and values", core.kv_bytes),
        )

    async def ask(self, request: Request) -> LocalStream:
        if self._trouble:
            raise Unavailable(self._trouble)
        asked = await self._loop.run_in_executor(self._encoder, self._encode, request)
        if self._trouble:
            raise Unavailable(self._trouble)
        stream = LocalStream(self._cancel)
        setting = Setting(request.method, request.keep)
        # Not waited for: a turn may be under way for seconds.
        self._inbox.put(lambda: self._submit(stream, asked, setting))
        return stream

    def _cancel(self, stream: LocalStream) -> None:
        self._inbox.put(lambda: self._forget(stream))

    def _encode(self, request: Request) -> Asked:
        """On the encoder's thread."""
        question = as_texts(request.question, self._answerer.reserved)
        decoding = Decoding(
            request.max_new_tokens, request.temperature, request.top_p, request.seed
        )
        return Asked(self._answerer.encode(question), decoding, request.stop)

    # ----------------------------------------------------------------- on the model's thread
    def _serve(self) -> None:
        while self._goes_on():
            pass
        self._drop(Unavailable(CLOSING))
        self._core.close()

    def _goes_on(self) -> bool:
        """Does what is asked for, and a turn; False: it is to end."""
        try:
            if not self._calls():
                return False
            if self._able:
                self._hand_out(self._core.turn())
        except Exception:  # the core catches what requests do; this is a bug of ours
            logger.exception("the model's thread failed")
            self._trouble = DEAD
            self._drop(Broken(DEAD))
        return True

    @property
    def _able(self) -> bool:
        """Whether a turn would do anything."""
        return self._core.busy and self._trouble != DEAD

    def _calls(self) -> bool:
        """Does what is asked for; waits for it where there is nothing else to do.

        Returns:
            Whether to go on.
        """
        wait = not self._able
        while True:
            try:
                call = self._inbox.get(block=wait)
            except Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def _submit(self, stream: LocalStream, asked: Asked, setting: Setting) -> None:
        if self._trouble:
            self._tell([(stream, Unavailable(self._trouble))])
            return
        try:
            stream.ticket = self._core.submit(asked, setting)
        except ValueError as error:
            self._tell([(stream, error)])
        else:
            self._streams[stream.ticket] = stream

    def _forget(self, stream: LocalStream) -> None:
        if stream.ticket is not None and self._streams.pop(stream.ticket, None) is not None:
            self._core.cancel(stream.ticket)

    def _drop(self, error: Exception) -> None:
        """Ends all requests."""
        events = [(stream, error) for stream in self._streams.values()]
        self._streams.clear()
        self._tell(events)

    def _hand_out(self, told: Iterable[Told | Failed]) -> None:
        """What a turn said: one piece for each request, however many tokens it got."""
        by_ticket: dict[Ticket, list[Told | Failed]] = {}
        for one in told:
            by_ticket.setdefault(one.ticket, []).append(one)
        events = [
            (self._streams[ticket], _event(parts))
            for ticket, parts in by_ticket.items()
            if ticket in self._streams
        ]
        for stream, event in events:
            if isinstance(event, Exception) or event.finish is not None:
                assert stream.ticket is not None
                del self._streams[stream.ticket]
        self._tell(events)

    def _tell(self, events: Sequence[tuple[LocalStream, Piece | Exception]]) -> None:
        def tell() -> None:
            for stream, event in events:
                stream.tell(event)

        if events:
            self._later(tell)

    def _later(self, work: Callable[[], object]) -> None:
        """Does something on the event loop."""
        self._loop.call_soon_threadsafe(work)


def _event(told: Sequence[Told | Failed]) -> Piece | Exception:
    """What a request hears of a turn."""
    last = told[-1]
    if isinstance(last, Failed):
        if last.sentence == FAILED:
            return Broken(FAILED)
        return Unavailable(NO_MEMORY) if last.sentence == NO_MEMORY else ValueError(last.sentence)
    row = last.event.row
    assert row.cost is not None
    usage = Usage(
        tokens_in=row.cost.tokens_in,
        tokens_kept=row.cost.tokens_kept,
        visual_in=row.cost.visual_in,
        visual_kept=row.cost.visual_kept,
        tokens_out=len(row.said.ids),
    )
    text = "".join(one.event.text for one in told if isinstance(one, Told))
    return Piece(text, usage, last.event.finish)
