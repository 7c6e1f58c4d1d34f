"""Encoder: one sample becomes input_ids, labels and pixel values, through the processor's template.

Supervised are the assistant turns, each with the token that ends it. Where the template marks them
({% generation %}) its marks are used; otherwise growing prefixes of the conversation are rendered,
and a turn is what rendering it adds. A template that ends no turn (stock LLaVA-1.5) gets the
end-of-sequence token, or the model would never learn to stop. A processor without a template that
takes a prompt and its answer (PaliGemma) writes the labels itself.

Shapes: T tokens of the sample, N images; pixel values keep the processor's own layout.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from itprune.inputs import (
    IGNORED,
    PER_TOKEN,
    placeholder_ids,
    plain_prompt,
    reserved_texts,
    takes_suffix,
)
from itprune.question import IMAGE
from train.data.images import ImageOpener
from train.data.sample import BadSample, Sample, Turn

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Encoder:
    """Encodes samples with one processor.

    Args:
        processor: a processor with a chat template and a fast tokenizer.
        max_length: tokens of a sample that may enter the language model.
        visual_share: how many of the image tokens do, on average.
        positions: tokens of a sample, dropped ones included, that the model has positions for;
            None: any number.

    Raises:
        ValueError: the processor has no chat template, or a slow tokenizer.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        visual_share: float = 1.0,
        positions: int | None = None,
    ) -> None:
        self.plain = takes_suffix(processor)
        if not self.plain and not processor.chat_template:
            raise ValueError("the processor has no chat template, so conversations cannot be read")
        if not processor.tokenizer.is_fast:
            raise ValueError("the tokenizer is a slow one; a tokenizer.json is needed for labels")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.visual_share = visual_share
        self.positions = positions
        self.reserved = reserved_texts(processor)
        self.visual_ids = torch.tensor(placeholder_ids(processor))
        self.has_marks = not self.plain and GENERATION.search(processor.chat_template) is not None
        self.adds_end = not self.plain and not self._ends_turns()

    def __call__(self, sample: Sample, open_image: ImageOpener) -> dict[str, Any]:
        """Encodes one sample.

        Returns:
            input_ids (T,), attention_mask (T,), labels (T,), and the image inputs if it has images.

        Raises:
            BadSample: an image cannot be opened, or no supervised token is left.
        """
        messages = self._messages(sample)
        images = [open_image(image) for image in sample.images]
        if self.plain:
            return self._finish(self._with_suffix(messages, images))
        text, spans = self._render(messages)
        inputs = self._process(
            images,
            text=[text],
            add_special_tokens=not self._starts_with_bos(text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets = inputs.pop("offset_mapping")[0]
        replaced = inputs.pop("text_replacement_offsets", None)  # a row's list, or nothing at all
        places = [] if replaced is None or len(replaced) == 0 else list(replaced[0])
        taught = _inside(offsets, [_shift(span, places) for span in spans])
        ids = inputs["input_ids"]
        return self._finish({**inputs, "labels": torch.where(taught[None], ids, IGNORED)})

    def _with_suffix(self, messages: list[dict[str, Any]], images: list[Any]) -> dict[str, Any]:
        *before, last = messages
        if last["role"] != "assistant":
            raise BadSample("no answer at its end, and this model's processor has no chat template")
        try:
            prompt = plain_prompt(before, self.processor.image_token)
        except ValueError as error:
            raise BadSample(str(error)) from None
        answer = " ".join(part["text"] for part in last["content"])
        return self._process(images, text=[prompt], suffix=[answer])

    def _process(self, images: list[Any], **options: Any) -> dict[str, Any]:
        """The processor's tensors; images of a sample together, as some families want it."""
        try:
            inputs = self.processor(
                images=[images] if images else None, return_tensors="pt", **options
            )
        except ValueError as error:
            raise BadSample(f"the processor refuses it: {str(error).splitlines()[0]}") from None
        return dict(inputs)

    def _finish(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        length = self._cut(inputs["input_ids"][0])
        encoded = {
            key: value[0, :length] if key in PER_TOKEN else value for key, value in inputs.items()
        }
        if bool((encoded["labels"][1:] == IGNORED).all()):
            raise BadSample(
                f"no supervised token in its first {length} tokens, more do not fit into "
                f"{self._limits()}"
            )
        return encoded

    def _cut(self, ids: torch.Tensor) -> int:
        """The length to keep: text is cut at its end, an image never."""
        visual = torch.isin(ids, self.visual_ids)
        entering = torch.where(visual, self.visual_share, 1.0).double().cumsum(0)
        length = int((entering <= self.max_length + 1e-6).sum())
        if self.positions is not None:
            if bool(visual[self.positions :].any()):
                raise BadSample(
                    f"its images need more than the {self.positions} positions of the model "
                    "(max_position_embeddings), dropped tokens included"
                )
            length = min(length, self.positions)
        if bool(visual[length:].any()):
            raise BadSample(f"its images need more than data.max_length = {self.max_length} tokens")
        return length

    def _limits(self) -> str:
        limits = f"data.max_length = {self.max_length}"
        if self.positions is None:
            return limits
        return f"{limits} and the model's {self.positions} positions"

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        messages = []
        for turn in sample.turns:
            texts = [part for part in turn.parts if part != IMAGE]
            for token in self.reserved:
                if any(token in text for text in texts):
                    raise BadSample(f"the text itself contains {token}")
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
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.processor.chat_template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise BadSample(f"the chat template refuses its turns ({error})") from None
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


def _inside(offsets: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """(T, 2) characters of tokens -> (T,) bool: which of them reach into a span."""
    starts, ends = torch.tensor(spans, dtype=offsets.dtype).reshape(-1, 2).T
    taught: torch.Tensor = (offsets[:, :1] < ends) & (offsets[:, 1:] > starts)
    return taught.any(1)
