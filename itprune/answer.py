"""Answerer: asks a loaded checkpoint questions, in batches, on the tokens its pruner keeps.

A question is encoded alone, so what is wrong with it concerns no other; a batch is then padded on
the left and handed to the model's own `generate`. Every answer says what it cost.

Shapes: B questions of a batch, T prompt tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer

from itprune.attach import base_model
from itprune.checkpoint import Loaded
from itprune.decoding import Clock, Decoding, RowSampler, row_seed
from itprune.families import find_family
from itprune.inputs import PER_TOKEN, join, plain_prompt, reserved_texts, takes_suffix
from itprune.question import Question
from itprune.report import Report, Segment


class TooLong(ValueError):
    """A prompt that does not fit the model's context."""


@dataclass(frozen=True)
class Encoded:
    """One question: tensors of its tokens (T,), and image inputs as the processor lays them out."""

    inputs: Mapping[str, Tensor]
    prepare_s: float

    @property
    def length(self) -> int:
        """Prompt tokens, image tokens included."""
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost."""

    answer: str
    finish: str
    """stop: the model ended it; length: it was cut."""
    tokens_out: int
    tokens_in: int
    """Prompt tokens before pruning, image tokens included."""
    visual_in: int
    tokens_stage1: int
    """Tokens into the LLM."""
    visual_stage1: int
    tokens_stage2: int
    """Tokens that reach the last LLM layer; as after stage 1 where there is no stage 2."""
    visual_stage2: int
    layer_average: float
    """Share of the prompt's tokens kept, averaged over the LLM's layers."""
    visual_layer_average: float | None
    """The same of visual tokens, which is what `keep` aims at; None without images."""
    kv_entries: int
    """Cached tokens after the prompt, summed over layers."""
    kv_bytes: int
    """Keys and values of these entries."""
    prepare_s: float
    """Resizing and tokenising this question."""
    first_token_s: float
    """From the batch's start on the model to its first token: all questions of a batch run through
    the prompt together, so all have this in common."""
    total_s: float
    """From the batch's start on the model to this answer's last token."""
    batch: int
    """Questions answered together."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Answerer:
    """Answers questions with a loaded model.

    Args:
        loaded: from `load_pretrained`; with no pruner attached the model runs dense.
        decoding: how answers are drawn.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(self, loaded: Loaded, decoding: Decoding | None = None) -> None:
        self.loaded = loaded
        self.decoding = decoding or Decoding()
        self.model = base_model(loaded.model)
        self.processor: Any = loaded.processor
        self.plain = takes_suffix(self.processor)
        if not self.plain and not self.processor.chat_template:
            raise ValueError("the model's processor has no chat template, so it cannot be asked")
        self.reserved = reserved_texts(self.processor)
        self.visual_ids = torch.tensor(find_family(self.model).visual_token_ids)
        self.text_config = self.model.config.get_text_config()
        self.turn_end = "" if self.plain else self._turn_end()
        self.stops = _stops(self.model.generation_config, self.processor.tokenizer)

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers a batch."""
        return self.answer([self.encode(question) for question in questions])

    # -------------------------------------------------------------------------------- encode
    def encode(self, question: Question) -> Encoded:
        """Renders, tokenises and resizes one question.

        Raises:
            TooLong: the prompt does not fit the model's context.
            ValueError: the processor refuses it.
        """
        encoded = self.prepare(question)
        if encoded.length >= self.text_config.max_position_embeddings:
            raise TooLong(
                f"the prompt has {encoded.length} tokens with its images, but the model's context "
                f"holds {self.text_config.max_position_embeddings}; shorten it or use fewer images"
            )
        return encoded

    def prepare(self, question: Question) -> Encoded:
        """The same, whatever its length. Raises ValueError: the processor refuses it."""
        start = time.perf_counter()
        for token in self.reserved:
            if any(token in text for text in question.texts):
                raise ValueError(f"the text contains {token}, a token of the model's images")
        return Encoded(self._inputs(question), time.perf_counter() - start)

    def _inputs(self, question: Question) -> dict[str, Tensor]:
        """The processor's tensors; those of tokens without their batch axis."""
        options = {}
        if self.plain:
            text = plain_prompt(question.messages, self.processor.image_token)
        else:
            text, options["add_special_tokens"] = self.prompt(question)
        # Images of a row together: some families cut a lone image into tiles, but not several.
        images = [list(question.images)] if question.images else None
        inputs = self.processor(text=[text], images=images, return_tensors="pt", **options)
        return {
            key: value[0] if key in PER_TOKEN else value
            for key, value in inputs.items()
            if key != "labels"  # which some make of every prompt
        }

    def prompt(self, question: Question) -> tuple[str, bool]:
        """What the chat template writes, and whether the tokenizer is to add its special tokens."""
        text = self._render([self.ended(m) for m in question.messages], prompt=True)
        bos = self.processor.tokenizer.bos_token
        return text, bos is None or not text.startswith(bos)

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these turns ({error})") from None

    def _turn_end(self) -> str:
        """What training writes behind an answer where the template ends no turn (LLaVA-1.5)."""
        said = "answer"
        text = self._render([_message("user", "question"), _message("assistant", said)], False)
        if text.rpartition(said)[2].strip():
            return ""
        return self.processor.tokenizer.eos_token or ""

    def ended(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of the history as training saw it."""
        content = message["content"]
        if message["role"] != "assistant" or not content or content[-1]["type"] != "text":
            return message
        end = {"type": "text", "text": content[-1]["text"] + self.turn_end}
        return {**message, "content": [*content[:-1], end]}

    # -------------------------------------------------------------------------------- answer
    @torch.no_grad()
    def answer(self, batch: Sequence[Encoded]) -> list[Answer]:
        """Answers encoded questions together.

        Raises:
            ValueError: the model refuses one of them, or memory does not suffice.
        """
        rooms = [self.room(encoded) for encoded in batch]
        attached = self.loaded.attached
        before = attached.report if attached is not None else None
        clock = Clock(self.model.device)
        inputs = self.collate(batch)
        generate: Any = self.model.generate
        try:
            out = generate(
                **inputs,
                generation_config=self.settings(max(rooms)),
                logits_processor=self.sampler(batch),
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the device's memory does not hold {len(batch)} question(s) at once; "
                "use a smaller batch size"
            ) from None
        report = attached.report if attached is not None else None
        if report is None or report is before:  # nothing was pruned
            report = self._dense_report(inputs)
        new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        rows = [self._cut(ids, room) for ids, room in zip(new, rooms, strict=True)]
        return self._answers(batch, rows, report, out.past_key_values, clock)

    def room(self, encoded: Encoded) -> int:
        """Tokens an answer may have: as asked for, within the model's context."""
        left = self.text_config.max_position_embeddings - encoded.length
        return min(self.decoding.max_new_tokens, left)

    def collate(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Token tensors padded on the left; image tensors joined along their first axis.

        Raises:
            ValueError: images that do not fit into one tensor.
        """
        device, dtype = self.model.device, self.model.dtype
        joined = join([encoded.inputs for encoded in batch], self._pad_id(), "left")
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in joined.items()
        }

    def _pad_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self.stops[0] if pad is None else pad

    def settings(self, longest: int) -> GenerationConfig:
        """What `generate` is told, for answers of at most `longest` tokens."""
        return GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,  # RowSampler draws
            num_beams=1,
            use_cache=True,
            eos_token_id=list(self.stops),
            pad_token_id=self._pad_id(),
            return_dict_in_generate=True,
        )

    def sampler(self, batch: Sequence[Encoded]) -> LogitsProcessorList:
        """How tokens are drawn: each question has its own stream."""
        if self.decoding.temperature == 0:
            return LogitsProcessorList()
        seeds = [row_seed(self.decoding.seed, encoded.inputs.values()) for encoded in batch]
        return LogitsProcessorList([RowSampler(self.decoding, seeds)])

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Up to and with the token that ends the answer."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stops), len(ids))
        return ids[: min(end, room)]

    # -------------------------------------------------------------------------------- figures
    def _dense_report(self, inputs: Mapping[str, Tensor]) -> Report:
        valid = inputs["attention_mask"].sum(1)
        visual = torch.isin(inputs["input_ids"], self.visual_ids.to(valid.device)).sum(1)
        depth = self.text_config.num_hidden_layers
        return Report(depth, valid, visual, [Segment(0, valid, visual)])

    def _answers(
        self,
        batch: Sequence[Encoded],
        rows: list[list[int]],
        report: Report,
        cache: Any,
        clock: Clock,
    ) -> list[Answer]:
        sizes = [_entry_bytes(layer) for layer in cache.layers]
        last, last_visual = (list(d.values())[-1] for d in (report.drops, report.visual_drops))
        answers = []
        for i, (encoded, ids) in enumerate(zip(batch, rows, strict=True)):
            tokens = _per_layer(report.drops, report.depth, i)
            visual = _per_layer(report.visual_drops, report.depth, i)
            held = [_held(layer, n) for layer, n in zip(cache.layers, tokens, strict=True)]
            seen = report.visual_in[i]
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(
                Answer(
                    answer=text,
                    finish="stop" if ids[-1] in self.stops else "length",
                    tokens_out=len(ids),
                    tokens_in=report.tokens_in[i],
                    visual_in=seen,
                    tokens_stage1=report.tokens_stage1[i],
                    visual_stage1=report.visual_stage1[i],
                    tokens_stage2=last[i],
                    visual_stage2=last_visual[i],
                    layer_average=sum(tokens) / (report.depth * report.tokens_in[i]),
                    visual_layer_average=sum(visual) / (report.depth * seen) if seen else None,
                    kv_entries=sum(held),
                    kv_bytes=sum(n * size for n, size in zip(held, sizes, strict=True)),
                    prepare_s=encoded.prepare_s,
                    first_token_s=clock.ticks[0],
                    total_s=clock.ticks[len(ids) - 1],
                    batch=len(batch),
                )
            )
        return answers


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _per_layer(drops: Mapping[int, list[int]], depth: int, sample: int) -> list[int]:
    """One sample's count at every layer."""
    out: list[int] = []
    for layer in range(depth):
        out.append(drops[layer][sample] if layer in drops else out[-1])
    return out


def _held(layer: Any, tokens: int) -> int:
    """Entries a cache layer keeps of a prompt: one with a window forgets what it cannot reach."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(tokens, layer.sliding_window - 1)
    return tokens


def _entry_bytes(layer: Any) -> int:
    """Bytes one cached token takes in a layer: (B, H, L, d) keys and values."""
    return sum(t.shape[1] * t.shape[-1] * t.element_size() for t in (layer.keys, layer.values))


def _stops(config: GenerationConfig | None, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the model's own, else the tokenizer's end of sequence.

    Raises:
        ValueError: neither names one.
    """
    own = config.eos_token_id if config is not None else None
    own = tokenizer.eos_token_id if own is None else own
    if own is None:
        raise ValueError("neither the model nor its tokenizer names an end-of-sequence token")
    return tuple(own) if isinstance(own, list) else (own,)
