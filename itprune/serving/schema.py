"""Schema: the body of /v1/chat/completions, strictly read.

Whatever would change the answer and is not done here is refused, so that nobody takes an answer for
what it is not. A field set to null, or to what is done anyhow, is as one left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from itprune.options import LARGEST, nearest
from itprune.question import trimmed
from itprune.serving.openai_errors import ApiError

READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "seed", "stop", "keep", "method",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that are known and not done, and the values that ask for nothing."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say something about the client, not about the answer."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MESSAGE = ("role", "content", "name", "refusal")
MESSAGES = 1000
"""Of a request: a template takes its time for each, however little it says."""
LONGEST_NAME = 200
STOPS = 4
LONGEST_STOP = 200
HOTTEST = 2.0
NO_TENSORS = (
    "image_embeds: this server takes pictures only, never tensors; send image_url with a data URL"
)


@dataclass(frozen=True)
class Chat:
    """What a client wants. Lengths, budgets and pictures were not looked at."""

    model: str
    messages: tuple[dict[str, Any], ...]
    """As of `Question`."""
    images: tuple[str, ...]
    """URLs, one for each image place."""
    stream: bool
    usage: bool
    """A last event says what a stream cost."""
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    method: str | None
    keep: float | None


def read_chat(body: Any) -> Chat:
    """Reads a body.

    Args:
        body: from JSON.

    Raises:
        ApiError: 400, and what is wrong with it.
    """
    if not isinstance(body, Mapping):
        raise _wrong(None, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(given)
    messages, images = _messages(given.get("messages"))
    stream, usage = _streaming(given)
    temperature, top_p = _drawing(given)
    return Chat(
        model=_model(given),
        messages=messages,
        images=images,
        stream=stream,
        usage=usage,
        max_new_tokens=_longest(given),
        temperature=temperature,
        top_p=top_p,
        seed=_seed(given),
        stop=_stop(given.get("stop", ())),
        method=_method(given),
        keep=_number(given, "keep", 0.0, 1.0, 1.0) if "keep" in given else None,
    )


def _wrong(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in READ or name in IGNORED:
            continue
        if name not in NEUTRAL:
            shown = name[:60]
            hint = nearest(shown, (*READ, *NEUTRAL))
            raise ApiError(400, f"unknown field {shown!r}; {hint}", "unknown_parameter", shown)
        if not any(value == neutral for neutral in NEUTRAL[name]):
            raise ApiError(
                400, f"{name}: this server does not do that; leave it out", "unsupported", name
            )


# ------------------------------------------------------------------------------------- messages
def _messages(value: Any) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "messages: must be a list of at least one message")
    if len(value) > MESSAGES:
        raise _wrong("messages", f"messages: at most {MESSAGES}, got {len(value)}")
    images: list[str] = []
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _wrong(where, f"{where}: must be an object with role and content")
        extra = [name for name in message if name not in MESSAGE and message[name] is not None]
        if extra:
            raise _wrong(where, f"{where}: this server does not take {str(extra[0])[:60]!r} there")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise _wrong(f"{where}.role", f"{where}.role: must be one of {', '.join(ROLES)}")
        content, urls = _content(message.get("content"), f"{where}.content")
        if urls and role != "user":
            raise _wrong(f"{where}.content", f"{where}.content: only a user shows images")
        images += urls
        messages.append({"role": ROLES[role], "content": content})
    return tuple(messages), tuple(images)


def _content(value: Any, where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Parts without their URLs, and these."""
    if isinstance(value, str):
        value = [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise _wrong(where, f"{where}: must be text or a list of parts")
    parts: list[dict[str, Any]] = []
    urls = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            urls.append(_url(part.get("image_url"), at))
            parts.append({"type": "image"})
        elif kind == "image_embeds":
            raise _wrong(at, NO_TENSORS)
        else:
            raise _wrong(at, f"{at}: must be of type text or image_url")
    return trimmed(parts), urls


def _url(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        detail = value.get("detail")
        if detail not in (None, "auto", "low", "high"):
            raise _wrong(where, f"{where}.image_url.detail: must be auto, low or high")
        value = value.get("url")
    if not isinstance(value, str):
        raise _wrong(where, f"{where}.image_url: must be an object with a url")
    return value


# --------------------------------------------------------------------------------------- fields
def _model(given: Mapping[str, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str):
        raise _wrong("model", "model: must be the name of the model; /v1/models tells it")
    return model


def _method(given: Mapping[str, Any]) -> str | None:
    method = given.get("method")
    if method is None or (isinstance(method, str) and 0 < len(method) <= LONGEST_NAME):
        return method
    raise _wrong("method", "method: must be the name of a method")


def _streaming(given: Mapping[str, Any]) -> tuple[bool, bool]:
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise _wrong("stream", "stream: must be true or false")
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or options.keys() - {"include_usage"}:
        raise _wrong("stream_options", "stream_options: must be an object with include_usage")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise _wrong("stream_options", "stream_options.include_usage: must be true or false")
    if options and not stream:
        raise _wrong("stream_options", "stream_options: is for streams only; set stream, too")
    return stream, usage


def _longest(given: Mapping[str, Any]) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    values = [_whole(given, name, 1) for name in names]
    if len(set(values)) > 1:
        raise _wrong(names[0], "max_tokens and max_completion_tokens differ; send one of them")
    return values[0] if values else None


def _drawing(given: Mapping[str, Any]) -> tuple[float, float]:
    """Temperature and top_p. OpenAI draws where no temperature is sent; here such an answer is
    greedy, so who says how to draw must say that it is to be drawn."""
    temperature = _number(given, "temperature", 0.0, HOTTEST, 0.0)
    top_p = _number(given, "top_p", 0.0, 1.0, 1.0)
    if top_p < 1 and "temperature" not in given:
        raise _wrong("top_p", "top_p: without a temperature answers are greedy here; send it, too")
    return temperature, top_p


def _seed(given: Mapping[str, Any]) -> int | None:
    return _whole(given, "seed", -LARGEST - 1) if "seed" in given else None


def _whole(given: Mapping[str, Any], name: str, least: int) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise _wrong(name, f"{name}: must be a whole number of at least {least}")
    return value


def _number(given: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number up to `high`; `low` itself only where it is the default."""
    value = given.get(name, default)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not low <= value <= high or value == low != default:
        end = "at least" if default == low else "above"
        raise _wrong(name, f"{name}: must be a number {end} {low:g} and at most {high:g}")
    return float(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, list | tuple)
        or len(stops) > STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops)
    ):
        raise _wrong("stop", f"stop: must be a text or up to {STOPS}, none of them empty or long")
    return tuple(stops)
