"""A sample of the data, encoded as training will: lengths, what is wrong, what pruning will leave.

Nothing is forwarded. What a method keeps of an image is known for the average only, so the tokens
of a sample at a budget are its text and that share of its visual tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from itprune.inputs import IGNORED
from train.data.dataset import SampleDataset
from train.data.encode import Encoder
from train.data.sample import BadSample

KINDS = {
    "missing image": "images missing",
    "unreadable image": "images unreadable",
    "pixels, more than": "images too large",
    "times the other": "images too thin",
    "its images need more": "too many image tokens (data.max_length)",
    "no supervised token": "no supervised token left (data.max_length)",
}
"""What a refused sample's reason holds -> how it is counted."""
OTHER = "other"
ENDLESS = 1 << 40


@dataclass(frozen=True)
class Size:
    """One sample, before anything is cut or pruned."""

    place: str
    text: int
    visual: int
    images: int
    supervised: int
    patches: int
    """Encoder patches of its images."""

    def tokens(self, share: float) -> float:
        """What is left of it where `share` of its visual tokens stays."""
        return self.text + self.visual * share


@dataclass
class Survey:
    """What a sample of the data holds."""

    total: int
    """Samples of the whole data; 0: a stream does not tell."""
    asked: int = 0
    sizes: list[Size] = field(default_factory=list)
    """Of the samples that will train."""
    bad: Counter[str] = field(default_factory=Counter)
    """How many will be skipped, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason: its place and the sentence."""
    cut: int = 0
    """Samples whose text will be cut at its end."""
    learnt: str = ""
    """The supervised texts of the first good sample."""
    learnt_at: str = ""

    @property
    def bad_share(self) -> float:
        return sum(self.bad.values()) / self.asked if self.asked else 0.0


def survey(data: SampleDataset, encoder: Encoder, number: int, tower: Any) -> Survey:
    """Encodes `number` samples spread evenly over the data.

    Args:
        data: map-style samples.
        encoder: with the limits of the run.
        number: how many.
        tower: configuration of the vision encoder.
    """
    found = Survey(len(data), min(number, len(data)))
    whole = Encoder(encoder.processor, ENDLESS)
    for i in range(found.asked):
        index = i * len(data) // found.asked
        which = bisect_right(data.ends, index)
        records, opener = data.sources[which]
        row = index - (data.ends[which - 1] if which else 0)
        place = records.where(row)
        try:
            sample = records.sample(row)
            encoded = whole(sample, opener)
            kept = encoded if _fits(encoded, encoder) else encoder(sample, opener)
        except (BadSample, ValueError) as error:
            reason = next((k for part, k in KINDS.items() if part in str(error)), OTHER)
            found.bad[reason] += 1
            found.examples.setdefault(reason, f"{place}: {error}")
            continue
        found.cut += len(kept["input_ids"]) < len(encoded["input_ids"])
        found.sizes.append(_size(place, kept, len(sample.images), encoder, tower))
        if not found.learnt:
            found.learnt, found.learnt_at = _supervised(kept, encoder), place
    return found


def _fits(encoded: dict[str, Any], encoder: Encoder) -> bool:
    ids = encoded["input_ids"]
    visual = int(torch.isin(ids, encoder.visual_ids).sum())
    entering = len(ids) - visual * (1 - encoder.visual_share)
    return entering <= encoder.max_length and len(ids) <= (encoder.positions or ENDLESS)


def _size(place: str, encoded: dict[str, Any], images: int, encoder: Encoder, tower: Any) -> Size:
    ids, labels = encoded["input_ids"], encoded["labels"]
    visual = int(torch.isin(ids, encoder.visual_ids).sum())
    pixels = encoded.get("pixel_values")
    patches = 0
    if pixels is not None:
        side = tower.patch_size  # of some towers one number, of others two
        area = side**2 if isinstance(side, int) else side[0] * side[1]
        flat = pixels.ndim == 2  # a row for each patch
        patches = len(pixels) if flat else pixels[..., 0, :, :].numel() // area
    supervised = int((labels[1:] != IGNORED).sum())
    return Size(place, len(ids) - visual, visual, images, supervised, patches)


def _supervised(encoded: dict[str, Any], encoder: Encoder) -> str:
    """The stretches of text that are learnt, one a line."""
    taught = encoded["labels"] != IGNORED
    pieces: list[list[int]] = []
    last = False
    for token, supervised in zip(encoded["input_ids"].tolist(), taught.tolist(), strict=True):
        if supervised and not last:
            pieces.append([])
        if supervised:
            pieces[-1].append(token)
        last = supervised
    return "\n".join(str(encoder.tokenizer.decode(piece)) for piece in pieces)


@dataclass(frozen=True)
class Spread:
    """A distribution in four numbers."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values; zeros of none."""
        ordered = sorted(values) or [0]
        last = len(ordered) - 1
        picked = (ordered[round(last * q)] for q in (0, 0.5, 0.95, 1))
        return cls(*(round(value) for value in picked))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """What a budget leaves, on average over the sample."""

    keep: float | None
    """None: the method's rule decides, and nothing can be told."""
    enters: float
    """Tokens of a sample that enter the LLM."""
    average: float
    """Tokens of a sample, averaged over the LLM's layers."""
    dense: float
    """Tokens of a sample without pruning."""

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def kept_at(sizes: Sequence[Size], keep: float | None, enters: float) -> Kept:
    """The forecast of one budget.

    Args:
        sizes: the samples.
        keep: average share of the visual tokens over the layers.
        enters: share of them that enters the LLM.
    """
    count = max(len(sizes), 1)
    share = 1.0 if keep is None else keep
    return Kept(
        keep,
        sum(size.tokens(enters) for size in sizes) / count,
        sum(size.tokens(share) for size in sizes) / count,
        sum(size.tokens(1.0) for size in sizes) / count,
    )
