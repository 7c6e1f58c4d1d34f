"""Encoder: one sample becomes input_ids, labels and pixel values, through the processor's template.

Supervised are the assistant turns, each with the token that ends it. Where the template marks them
({% generation %}) its marks are used; otherwise growing prefixes of the conversation are rendered,
and a turn is what rendering it adds. A template that ends no turn (stock LLaVA-1.5) gets the
end-of-sequence token, or the model would never learn to stop.

Shapes: T tokens of the sample, N images; pixel values keep the processor's own layout.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from itprune.question import IMAGE
from train.data.images import ImageOpener
from train.data.sample import BadSample, Sample, Turn

IGNORED = -100
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Encoder:
    """Encodes samples with one processor.

    Args:
        processor: a processor with a chat template and a fast tokenizer.
        max_length: tokens of a sample, image tokens included.

    Raises:
        ValueError: the processor has no chat template, or a slow tokenizer.
    """

    def __init__(self, processor: Any, max_length: int) -> None:
        if not processor.chat_template:
            raise ValueError("the processor has no chat template, so conversations cannot be read")
        if not processor.tokenizer.is_fast:
            raise ValueError("the tokenizer is a slow one; a tokenizer.json is needed for labels")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.has_marks = GENERATION.search(processor.chat_template) is not None
        self.adds_end = not self._ends_turns()

    def __call__(self, sample: Sample, open_image: ImageOpener) -> dict[str, Any]:
        """Encodes one sample.

        Returns:
            input_ids (T,), attention_mask (T,), labels (T,), and the image inputs if it has images.

        Raises:
            BadSample: an image cannot be opened, or no supervised token is left.
        """
        messages = self._messages(sample)
        text, spans = self._render(messages)
        images = [open_image(image) for image in sample.images]
        try:
            inputs = self.processor(
                text=[text],
                images=images or None,
                add_special_tokens=not self._starts_with_bos(text),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except ValueError as error:
            raise BadSample(f"the processor refuses it: {str(error).splitlines()[0]}") from None
        return self._finish(dict(inputs), spans)

    def _finish(self, inputs: dict[str, Any], spans: list[Span]) -> dict[str, Any]:
        offsets = inputs.pop("offset_mapping")[0]
        replaced = (inputs.pop("text_replacement_offsets", None) or [[]])[0]
        spans = [_shift(span, replaced) for span in spans]
        ids = list(inputs.pop("input_ids")[0])
        labels = [
            token if any(_overlap(offset, span) for span in spans) else IGNORED
            for token, offset in zip(ids, offsets, strict=True)
        ]
        length = self._cut(ids)
        if all(label == IGNORED for label in labels[1:length]):
            raise BadSample(
                f"no supervised token in its first {self.max_length} tokens (data.max_length)"
            )
        encoded = {
            "input_ids": torch.tensor(ids[:length]),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": torch.tensor(labels[:length]),
        }
        inputs.pop("attention_mask", None)
        for key, value in inputs.items():
            if key in ("token_type_ids", "mm_token_type_ids"):
                encoded[key] = torch.tensor(list(value[0])[:length])
            else:
                encoded[key] = _tensor(value)
        return encoded

    def _cut(self, ids: list[int]) -> int:
        """The length to keep; an image is never cut in two."""
        image = self.processor.image_token_id
        if image in ids[self.max_length :]:
            raise BadSample(f"its images need more than data.max_length = {self.max_length} tokens")
        return min(len(ids), self.max_length)

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        image_token = self.processor.image_token
        messages = []
        for turn in sample.turns:
            if any(image_token in part for part in turn.parts if part != IMAGE):
                raise BadSample(f"the text itself contains {image_token}")
            messages.append({"role": turn.role, "content": self._content(turn)})
        return messages

    def _content(self, turn: Turn) -> list[dict[str, str]]:
        content = [
            {"type": "image"} if part == IMAGE else {"type": "text", "text": part}
            for part in turn.parts
        ]
        if turn.role == "assistant" and self.adds_end and content:
            content[-1]["text"] += self.tokenizer.eos_token
        return content

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters that are supervised."""
        text, marks = self._template(messages, marks=self.has_marks)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            until, _ = self._template(messages[: i + 1])
            if not text.startswith(until):
                raise BadSample("the chat template does not render turn by turn")
            end = len(until.rstrip())
            spans.append((self._start(messages[:i], text, marks, len(spans)), end))
        return text, spans

    def _start(self, before: list[dict[str, Any]], text: str, marks: list[Span], turn: int) -> int:
        if turn < len(marks):
            return marks[turn][0]
        prompt, _ = self._template(before, prompt=True)
        if not text.startswith(prompt):
            raise BadSample("the chat template's generation prompt does not fit its assistant turn")
        return len(prompt)

    def _template(
        self, messages: list[dict[str, Any]], prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def _ends_turns(self) -> bool:
        """Whether the template writes anything but space after an assistant turn."""
        probe = "answer"
        content = [{"type": "text", "text": probe}]
        question = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        text, _ = self._template([question, {"role": "assistant", "content": content}])
        return bool(text.rpartition(probe)[2].strip())

    def _starts_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)


def _shift(span: Span, replaced: list[dict[str, Any]]) -> Span:
    """Moves characters of the rendered text to where image placeholders have been expanded."""
    ends = [place["span"][1] for place in replaced]
    gained = [0] + [place["new_span"][1] - place["span"][1] for place in replaced]
    start, end = (char + gained[bisect_right(ends, char)] for char in span)
    return start, end


def _overlap(token: Span, span: Span) -> bool:
    return token[0] < span[1] and token[1] > span[0]


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.stack([torch.as_tensor(item) for item in value])
