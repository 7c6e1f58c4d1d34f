"""What lmms-eval's tasks say about an answer, as our decoding: pure functions.

Tasks were written for many models, and their settings carry what only some of them know. What
would change an answer and is not possible here is refused or told; the rest is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from itprune.decoding import Decoding

LONGEST = 1024
"""Longest answer, in tokens, where a task says nothing; as in lmms-eval's own models."""
KNOWN = frozenset({"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams"})
NEUTRAL = frozenset({"image_aspect_ratio", "image_sizes", "use_cache"})
"""Settings of other models' image code or of speed."""
BLANK_LINE = "\n\n"
"""lmms-eval's default where a task names no stop string. It is meant for few-shot prompts of plain
language models; its own vision models do not obey it, since it cuts answers of several paragraphs.
"""


def decoding(settings: Mapping[str, Any], seed: int, longest: int = LONGEST) -> Decoding:
    """How answers are drawn.

    Args:
        settings: a task's `generation_kwargs`.
        seed: of sampling.
        longest: where the task names no `max_new_tokens`.

    Raises:
        ValueError: a value out of range, or beams.
    """
    beams = settings.get("num_beams")
    if beams not in (None, 1):
        raise ValueError(
            f"num_beams={beams}: answers are drawn greedily or by sampling; "
            "run with --gen_kwargs num_beams=1"
        )
    tokens = settings.get("max_new_tokens")
    temperature = _temperature(settings)
    top_p = settings.get("top_p") if temperature else None  # of no effect on greedy search
    return Decoding(
        max_new_tokens=longest if tokens is None else int(tokens),
        temperature=temperature,
        top_p=1.0 if top_p is None else float(top_p),
        seed=seed,
    )


def _temperature(settings: Mapping[str, Any]) -> float:
    given, sampled = settings.get("temperature"), settings.get("do_sample")
    if sampled is False:
        return 0.0
    if given is None:
        return 1.0 if sampled else 0.0
    return float(given)


def unused(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of settings that would change answers and are not obeyed."""
    return tuple(sorted(settings.keys() - KNOWN - NEUTRAL))


def stop_strings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts that end an answer.

    Raises:
        ValueError: `until` is neither text nor a list of texts.
    """
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"until={until!r}: must be a text or a list of texts")
    return tuple(stop for stop in stops if stop and stop != BLANK_LINE)


def cut(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    ends = [answer.find(stop) for stop in stops if stop in answer]
    return answer[: min(ends)].strip() if ends else answer
