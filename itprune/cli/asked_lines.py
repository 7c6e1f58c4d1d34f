"""Lines answered by servers elsewhere, several at a time. A bad line costs the others nothing.

Lines that no server takes are not bad: they wait, and where that is of no use the run ends, and the
next one begins with them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from itprune.cli.question_lines import Line, QuestionLines
from itprune.decoding import Decoding
from itprune.serving.backend import Broken, Piece, Request, Unavailable
from itprune.serving.upstream import UpstreamBackend


class AskedLines:
    """Has lines answered.

    Args:
        backend: not started yet.
        source: reads the lines.
        draw: how answers are drawn.
        write: takes a record.
        bar: moved by one for each line.
        seconds: that a line may take.
    """

    def __init__(
        self,
        backend: UpstreamBackend,
        source: QuestionLines,
        draw: Decoding,
        write: Callable[[dict[str, Any]], None],
        bar: tqdm[Any],
        seconds: float,
    ) -> None:
        self._backend, self._source, self._draw = backend, source, draw
        self._write, self._bar, self._seconds = write, bar, seconds
        self._end = ""
        """Why no line can be answered any more; empty: they can."""

    async def __call__(self, lines: Sequence[Line], concurrency: int) -> None:
        """Answers lines, and writes each record when it is there.

        Raises:
            ValueError: no server answers at the start, or none does any longer.
        """
        await self._backend.start()
        try:
            if trouble := self._backend.trouble():
                raise ValueError(f"--upstream: {trouble}")
            left = iter(lines)
            await asyncio.gather(*(self._work(left) for _ in range(concurrency)))
            if self._end:
                raise ValueError(
                    f"--upstream: {self._end}; the same command goes on with the lines that are "
                    "left"
                )
        finally:
            await self._backend.close()

    async def _work(self, left: Iterator[Line]) -> None:
        for line in left:
            record: dict[str, Any] = {"line": line.number, "key": line.key}
            try:
                async with asyncio.timeout(self._seconds):
                    await self._ask(line, record)
            except TimeoutError:
                if trouble := self._backend.trouble():
                    self._end = trouble
                    return
                self._blame(record, f"no answer within {self._seconds:g} seconds")
            except Unavailable as error:
                self._end = str(error)
                return
            except (ValueError, Broken) as error:
                self._blame(record, str(error))
            self._write(record)
            self._bar.update()
            if self._end:
                return

    def _blame(self, record: dict[str, Any], sentence: str) -> None:
        record["error"] = sentence
        self._bar.write(f"line {record['line']}: {sentence}", file=sys.stderr)

    async def _ask(self, line: Line, record: dict[str, Any]) -> None:
        read = line.record()
        if isinstance(read, dict) and read.get("id") is not None:
            record["id"] = read["id"]
        question = await asyncio.to_thread(self._source.question, read)
        draw, facts = self._draw, self._backend.facts()
        request = Request(
            question,
            draw.max_new_tokens,
            draw.temperature,
            draw.top_p,
            draw.seed,
            (),
            facts.method,
            facts.keep,
        )
        stream = await self._backend.ask(request)
        try:
            pieces = [piece async for piece in stream]
        finally:
            await stream.aclose()
        record.update(_figures(pieces))


def _figures(pieces: Sequence[Piece]) -> dict[str, Any]:
    usage = pieces[-1].usage
    return {
        "answer": "".join(piece.text for piece in pieces),
        "finish": pieces[-1].finish,
        "tokens_out": usage.tokens_out,
        "tokens_in": usage.tokens_in,
        "tokens_kept": usage.tokens_kept,
        "visual_in": usage.visual_in,
        "visual_kept": usage.visual_kept,
    }
