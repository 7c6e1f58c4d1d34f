"""Real vLLM servers answer requests whose pictures keep different numbers of rows, as transformers
does; each request is new to the server, and all are under way together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from itprune import load_pretrained
from tests.lmms.inside import Inside
from tests.vllm.documented import documented
from tests.vllm.models import QUESTION, pictures
from tests.vllm.server import (
    SMALL,
    TOKENS,
    Server,
    at_once,
    free_port,
    image,
    serving,
    shown,
    text,
    written,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
REQUESTS = 24


class Asked:
    """What transformers makes of pictures and of the rows that stay of them."""

    def __init__(self, folder: Path) -> None:
        loaded = load_pretrained(folder, device="cpu", dtype=torch.float32)
        self.processor: Any = loaded.processor
        self.model: Any = loaded.model
        assert loaded.attached is not None
        pixels = self.processor.image_processor(pictures(REQUESTS, 7), return_tensors="pt")
        with torch.no_grad():
            features = self.model.get_image_features(**pixels, return_dict=True).pooler_output
        self.rows = [image[image.any(-1)] for image in features]
        loaded.attached.detach()

    def prompt(self, *rows: Tensor) -> Tensor:
        """(T, W) of one question about images."""
        content = [*({"type": "image"} for _ in rows), {"type": "text", "text": QUESTION}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        words = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = words["input_ids"][0]
        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(ids)
        parts, start = [], 0
        places = (ids == self.processor.image_token_id).nonzero()[:, 0]
        for place, kept in zip(places, rows, strict=True):
            parts += [embedded[start:place], kept]
            start = int(place) + 1
        return torch.cat([*parts, embedded[start:]])

    @torch.no_grad()
    def answer(self, prompt: Tensor) -> list[int]:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        out = self.model.generate(
            inputs_embeds=prompt[None], attention_mask=mask, max_new_tokens=TOKENS, do_sample=False
        )
        ids: list[int] = out[0].tolist()
        return ids

    @torch.no_grad()
    def seen(self, picture: Image.Image) -> list[int]:
        """The dense model's answer."""
        features = self.model.get_image_features(
            **self.processor.image_processor([picture], return_tensors="pt"), return_dict=True
        )
        return self.answer(self.prompt(features.pooler_output[0]))


@pytest.fixture(scope="module")
def asked(exported: Path) -> Asked:
    asked = Asked(exported)
    assert len(asked.rows) == REQUESTS
    assert len({len(rows) for rows in asked.rows}) > 3
    return asked


def test_vllms_own_class_takes_whole_prompts_of_any_counts(stock: Server, asked: Asked) -> None:
    prompts = [asked.prompt(rows) for rows in asked.rows]
    assert at_once(stock.complete, prompts) == [asked.answer(prompt) for prompt in prompts]


def test_vllms_own_class_takes_rows_within_a_chat(stock: Server, asked: Asked) -> None:
    """The template writes nothing where a picture's rows stand, so the text brings its line end."""
    prompts = [asked.prompt(rows.flip(0)) for rows in asked.rows]

    def ask(rows: Tensor) -> list[int]:
        given = {"type": "prompt_embeds", "data": written(rows.flip(0))}
        return stock.chat(given, text(f"\n{QUESTION}"))

    assert at_once(ask, asked.rows) == [asked.answer(prompt) for prompt in prompts]


def test_vllms_own_class_takes_images_of_one_count(stock: Server, asked: Asked) -> None:
    least = min(len(rows) for rows in asked.rows)
    some = [rows[:least] for rows in asked.rows[:6]]

    def ask(rows: Tensor) -> list[int]:
        return stock.chat(image(rows), text(QUESTION))

    assert at_once(ask, some) == [asked.answer(asked.prompt(rows)) for rows in some]


def test_a_plugin_that_is_not_asked_for_changes_nothing(stock: Server, asked: Asked) -> None:
    for picture in pictures(2, 9):
        assert stock.chat(shown(picture), text(QUESTION)) == asked.seen(picture)


def test_our_class_takes_images_of_any_counts(vllm: Inside, exported: Path, asked: Asked) -> None:
    port = free_port()
    (_, words) = documented("vllm", "serve")
    words[words.index("outputs/deployed")] = exported.name
    words += ["--served-model-name", exported.name, "--port", str(port), *SMALL]
    with serving(vllm, words, exported.name, port) as server:

        def ask(rows: list[Tensor]) -> list[int]:
            return server.chat(*map(image, rows), text(QUESTION))

        given = [[rows] for rows in asked.rows] + [
            [a.flip(0), b.flip(0)] for a, b in zip(asked.rows[:3], asked.rows[3:6], strict=True)
        ]
        expected = [asked.answer(asked.prompt(*rows)) for rows in given]
        assert at_once(ask, given) == expected

        (picture,) = pictures(1, 9)
        assert server.chat(shown(picture), text(QUESTION)) == asked.seen(picture)

        narrow = [{"role": "user", "content": [image(torch.ones(4, 99)), text(QUESTION)]}]
        status, _ = server.ask("/v1/chat/completions", messages=narrow)
        assert 400 <= status < 500
        assert ask(given[0]) == expected[0]
