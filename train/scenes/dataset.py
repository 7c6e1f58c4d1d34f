"""Writes scenes as an ordinary LLaVA data set: PNG files and two JSON lists.

`OUT/train.json` and `OUT/val.json` hold samples `{id, image, conversations}`; text-only samples
have no `image`; validation samples also carry `kind`, the question type. Training and
validation pictures show disjoint handwriting.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.scenes.questions import SETS, Dialogue, Kind, scene_items
from train.scenes.render import draw_scenes, sample_scenes

Sample = dict[str, Any]
CHUNK = 64


def write_dataset(
    out: str | Path,
    train: int,
    val: int,
    seed: int = 0,
    questions: str | Sequence[str] = "base",
) -> dict[str, list[Sample]]:
    """Write a data set; the same arguments give the same files.

    Args:
        out: Folder to fill with `train.json`, `val.json` and `images/`.
        train: Number of training samples, one scene each.
        val: Number of validation samples.
        seed: Chooses scenes, handwriting and questions.
        questions: `base`, `quickstart`, `transfer` or `all`, or the names of question kinds.

    Returns:
        The samples of both splits, as written.
    """
    kinds = choose_kinds(questions)
    root = Path(out)
    (root / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for number, (split, size) in enumerate((("train", train), ("val", val))):
        rng = np.random.default_rng([seed, number])
        asked: Counter[str] = Counter()
        samples = [
            sample
            for start in range(0, size, CHUNK)
            for sample in _write_chunk(
                root, split, range(start, min(start + CHUNK, size)), kinds, asked, rng
            )
        ]
        (root / f"{split}.json").write_text(json.dumps(samples, indent=1) + "\n")
        written[split] = samples
    return written


def choose_kinds(questions: str | Sequence[str]) -> dict[str, Kind]:
    """Question kinds by the name of a set or by their own names."""
    if isinstance(questions, str) and questions in SETS:
        return SETS[questions]
    names = questions.split(",") if isinstance(questions, str) else list(questions)
    unknown = sorted(set(names) - set(SETS["all"]))
    if unknown or not names:
        raise ValueError(
            f"question kinds {unknown} are not known; use one of {sorted(SETS)} "
            f"or names among {sorted(SETS['all'])}"
        )
    return {name: SETS["all"][name] for name in names}


def _write_chunk(
    root: Path,
    split: str,
    numbers: range,
    kinds: dict[str, Kind],
    asked: Counter[str],
    rng: np.random.Generator,
) -> list[Sample]:
    """Draw the scenes of some sample numbers; ask each the least asked question it settles."""
    scenes = sample_scenes(rng, len(numbers), split)
    pictures, _ = draw_scenes(rng, scenes, split)
    samples = []
    for index, number in enumerate(numbers):
        items = scene_items(scenes, index)
        order = sorted(kinds, key=lambda name: asked[name])
        found = (kinds[name](items, rng) for name in order)
        dialogue = next((one for one in found if one), None)
        if dialogue is None:
            continue
        asked[dialogue.kind] += 1
        sample = to_sample(f"{split}-{number:06d}", dialogue)
        if dialogue.image:
            Image.fromarray(pictures[index]).save(root / sample["image"])
        if split == "val":
            sample["kind"] = dialogue.kind
        samples.append(sample)
    return samples


def to_sample(name: str, dialogue: Dialogue) -> Sample:
    """One conversation in LLaVA's JSON form."""
    conversations = []
    for number, (question, answer) in enumerate(dialogue.turns):
        mark = "<image>\n" if dialogue.image and number == 0 else ""
        conversations.append({"from": "human", "value": mark + question})
        conversations.append({"from": "gpt", "value": answer})
    sample: Sample = {"id": name}
    if dialogue.image:
        sample["image"] = f"images/{name}.png"
    sample["conversations"] = conversations
    return sample


def answers(sample: Sample) -> list[str]:
    """The right answers of a sample, turn by turn."""
    return [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]


def shape_of(sample: Sample) -> str:
    """The first question without its digits and colours: which form of question it is."""
    from train.scenes.render import COLOUR_NAMES

    words = sample["conversations"][0]["value"].replace("<image>\n", "")
    for name in COLOUR_NAMES:
        words = words.replace(name, "*")
    shape = "".join("#" if letter.isdigit() else letter for letter in words)
    return f"{shape}|{len(answers(sample))}"


def majority_answers(train: Sequence[Sample]) -> dict[str, list[str]]:
    """For each form of question the most frequent training answer of every turn."""
    seen: dict[str, list[Counter[str]]] = defaultdict(list)
    for sample in train:
        counters = seen[shape_of(sample)]
        for turn, answer in enumerate(answers(sample)):
            if turn == len(counters):
                counters.append(Counter())
            counters[turn][answer] += 1
    return {
        shape: [counter.most_common(1)[0][0] for counter in counters]
        for shape, counters in seen.items()
    }


def majority_accuracy(train: Sequence[Sample], val: Sequence[Sample]) -> dict[str, float]:
    """Exact match by kind of always giving the most frequent training answer."""
    common = majority_answers(train)
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample in val:
        hits[sample["kind"]].append(common.get(shape_of(sample)) == answers(sample))
    return {kind: float(np.mean(found)) for kind, found in hits.items()}
