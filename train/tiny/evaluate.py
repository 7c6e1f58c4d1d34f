"""Exact match of a saved model folder on scene questions, through its processor and `generate`.

`python -m train.tiny.evaluate MODEL DATA` prints, kind by kind: the model with its picture,
the model with another scene's picture (image-blind), and the most frequent training answer.
Every turn is asked with the right answers of the earlier turns before it; a sample counts only
when all its turns are right.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, ProcessorMixin

from train.scenes.dataset import Sample, answers, majority_accuracy

logger = logging.getLogger(__name__)


def load(folder: str | Path) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """Load a model folder with stock classes, in float32; every weight must be there."""
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"{folder} does not fit LlavaForConditionalGeneration: {report}")
    return model.eval(), AutoProcessor.from_pretrained(folder)


def messages_until(sample: Sample, turn: int) -> list[dict[str, Any]]:
    """The conversation up to and with question `turn`, in chat-template form."""
    messages = []
    for index, said in enumerate(sample["conversations"][: 2 * turn + 1]):
        text = said["value"].replace("<image>\n", "")
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if index == 0 and "image" in sample:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user" if index % 2 == 0 else "assistant", "content": content})
    return messages


def answer_all(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    pictures: Sequence[Image.Image | None],
    batch: int = 32,
) -> list[list[str]]:
    """Greedy answers to every turn of every sample."""
    jobs = [(i, turn) for i, sample in enumerate(samples) for turn in range(len(answers(sample)))]
    jobs.sort(key=lambda job: (pictures[job[0]] is None, job[1]))
    said: list[list[str]] = [[""] * len(answers(sample)) for sample in samples]
    for kind in (False, True):
        part = [job for job in jobs if (pictures[job[0]] is None) == kind]
        for start in range(0, len(part), batch):
            chunk = part[start : start + batch]
            texts = [
                processor.apply_chat_template(
                    messages_until(samples[i], turn), add_generation_prompt=True
                )
                for i, turn in chunk
            ]
            shown = None if kind else [pictures[i] for i, _ in chunk]
            inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            for (i, turn), text in zip(
                chunk, processor.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                said[i][turn] = text.strip()
    return said


def by_kind(samples: Sequence[Sample], said: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of samples of each kind with all turns right."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample, given in zip(samples, said, strict=True):
        hits[sample["kind"]].append(list(given) == answers(sample))
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


def open_pictures(root: Path, samples: Sequence[Sample]) -> list[Image.Image | None]:
    """The picture of every sample, None for text-only ones."""
    return [Image.open(root / s["image"]).convert("RGB") if "image" in s else None for s in samples]


def swapped(pictures: Sequence[Image.Image | None]) -> list[Image.Image | None]:
    """Every picture replaced by the next sample's: what an image-blind reader has to go by."""
    places = [i for i, picture in enumerate(pictures) if picture is not None]
    others = list(pictures)
    for place, other in zip(places, places[1:] + places[:1], strict=True):
        others[place] = pictures[other]
    return others


def evaluate(folder: str | Path, data: str | Path) -> dict[str, dict[str, float]]:
    """Accuracy by kind of the model, image-blind and majority-class answers."""
    root = Path(data)
    train, val = (json.loads((root / f"{split}.json").read_text()) for split in ("train", "val"))
    model, processor = load(folder)
    pictures = open_pictures(root, val)
    return {
        "model": by_kind(val, answer_all(model, processor, val, pictures)),
        "image-blind": by_kind(val, answer_all(model, processor, val, swapped(pictures))),
        "majority": majority_accuracy(train, val),
        "count": dict(Counter(sample["kind"] for sample in val)),
        "pictured": dict(Counter(sample["kind"] for sample in val if "image" in sample)),
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table, ending with means over all samples."""
    names = ["model", "image-blind", "majority"]
    lines = ["| kind | samples | " + " | ".join(names) + " |", "|---|---|---|---|---|"]
    count = figures["count"]
    groups = {kind: {kind: count[kind]} for kind in sorted(count)}
    groups |= {"all with a picture": figures["pictured"], "all": count}
    for label, group in groups.items():
        total = sum(group.values())
        if not total:
            continue
        means = [sum(figures[name][kind] * group[kind] for kind in group) / total for name in names]
        cells = " | ".join(f"{100 * mean:.1f}" for mean in means)
        lines.append(f"| {label} | {total:.0f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate a folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.tiny.evaluate", description=__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="folder written by python -m train.scenes")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("%s", table(evaluate(given.model, given.data)))


if __name__ == "__main__":
    main()
