"""Whatever JSON a client sends: a request, or one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itprune.serving.openai_errors import ApiError
from itprune.serving.schema import NEUTRAL, READ, Chat, read_chat
from tests.serving.endpoint import asked

WORDS = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "user", "assistant", "detail", "auto"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries(
    {"type": WORDS}, optional={"text": st.text(max_size=5), "image_url": JSON}
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS | JSON, "content": st.lists(PARTS | JSON) | JSON}),
    max_size=3,
)


def check(error: ApiError) -> None:
    """It is a refusal that can be sent."""
    assert error.status == 400
    assert error.message
    assert "\n" not in error.message
    json.dumps(error.body(), ensure_ascii=False).encode()


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([*READ, *NEUTRAL]), JSON, max_size=5),
    MESSAGES | JSON,
)
def test_any_body_is_read_or_refused_in_one_sentence(fields: dict[str, Any], messages: Any) -> None:
    body = {**fields, "model": "tiny", "messages": messages}
    try:
        chat = read_chat(body)
    except ApiError as error:
        check(error)
        return
    assert isinstance(chat, Chat)
    places = [p for m in chat.messages for p in m["content"] if p["type"] == "image"]
    assert len(places) == len(chat.images)
    assert all(isinstance(url, str) for url in chat.images)


@given(JSON)
def test_any_other_body_is_refused(body: Any) -> None:
    with pytest.raises(ApiError):
        read_chat(body)


def test_defaults() -> None:
    chat = read_chat({"model": "tiny", "messages": asked(text=" a "), "seed": None})
    assert chat == Chat(
        model="tiny",
        messages=({"role": "user", "content": [{"type": "text", "text": "a"}]},),
        images=(),
        stream=False,
        usage=False,
        max_new_tokens=None,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        stop=(),
        method=None,
        keep=None,
    )


def test_words_of_two_parts_stay_apart() -> None:
    parts = [" ", " What digit ", "", "is ", "red? ", "data:a", " And now? "]
    content = [
        {"type": "image_url", "image_url": text}
        if text.startswith("data:")
        else {"type": "text", "text": text}
        for text in parts
    ]
    chat = read_chat({"model": "tiny", "messages": [{"role": "user", "content": content}]})
    found = [part.get("text") for part in chat.messages[0]["content"]]
    assert found == ["What digit ", "is ", "red?", None, "And now?"]


def test_everything_that_can_be_asked() -> None:
    chat = read_chat(
        {
            "model": "tiny",
            "messages": [
                {"role": "developer", "content": "be short", "name": "me"},
                {"role": "user", "content": [{"type": "image_url", "image_url": "data:a"}]},
                {"role": "assistant", "content": "b", "refusal": None},
                *asked("data:c", "data:d"),
            ],
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "temperature": 1,
            "top_p": 0.5,
            "seed": -3,
            "stop": "x",
            "stream": True,
            "stream_options": {"include_usage": True},
            "keep": 1,
            "method": "a+b",
            "user": "somebody",
        }
    )
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert chat.images == ("data:a", "data:c", "data:d")
    assert (chat.max_new_tokens, chat.temperature, chat.top_p, chat.seed) == (5, 1.0, 0.5, -3)
    assert (chat.stop, chat.stream, chat.usage) == (("x",), True, True)
    assert (chat.keep, chat.method) == (1.0, "a+b")
