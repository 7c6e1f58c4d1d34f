"""SampleDataset: any mix of data files as one map-style dataset that never stumbles.

A bad sample is replaced by the next good one. The replacement depends on the index alone, so every
rank keeps its batch shape, and a resumed run reads what an uninterrupted one would have read. What
was skipped travels with the batch to the trainer, which counts it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from train.data.collate import BAD, PLACES
from train.data.encode import Encoder
from train.data.formats import STREAMED, files_of, kind_of
from train.data.hub import DatasetRecords
from train.data.images import ImageOpener
from train.data.lengths import Outline
from train.data.llava import LlavaRecords
from train.data.messages import JsonlRecords
from train.data.mixture import Mixture
from train.data.sample import BadSample, LostSource, Records
from train.data.workers import start_worker
from train.recipe.sections import DataSection


class SampleDataset(Dataset[dict[str, Any]]):
    """Encoded samples of several sources.

    Args:
        sources: pairs of records and the opener of their images.
        encoder: turns a sample into tensors.
        max_bad: fraction of bad samples at which reading gives up.
        mixture: the proportions of the entries; None: every sample once an epoch.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Records, ImageOpener]],
        encoder: Encoder,
        max_bad: float,
        mixture: Mixture | None = None,
    ) -> None:
        self.sources = list(sources)
        self.encoder = encoder
        self.mixture = mixture
        self.ends = list(accumulate(len(records) for records, _ in self.sources))
        if not len(self):
            raise ValueError("data: the files hold no sample")
        self.allowed = int(max_bad * len(self))
        self._reader = 0

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded sample, or the next good one; only `bad` when there are too many bad ones, or
        when a file has changed or gone."""
        if self._reader != os.getpid():
            self._reader = os.getpid()
            start_worker()
        bad: list[tuple[int, str, str]] = []
        for step in range(min(self.allowed + 1, len(self))):
            i = (index + step) % len(self)
            records, opener, row = self._find(i)
            try:
                encoded = self.encoder(records.sample(row), opener)
            except LostSource as error:
                return {BAD: [(i, records.where(row), str(error))]}
            except BadSample as error:
                bad.append((i, records.where(row), str(error)))
            else:
                return {**encoded, BAD: bad, PLACES: records.where(row)}
        return {BAD: bad}

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(N,) indices of an epoch's samples in their order, the same on every rank."""
        if self.mixture is not None:
            return self.mixture.order(seed, epoch)
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def where(self, index: int) -> str:
        """The place of a sample, for reports."""
        records, _, row = self._find(index)
        return records.where(row)

    def outline(self, index: int) -> Outline:
        """Bytes of a sample's text and number of its images, without opening any; zeros where it
        is a bad one."""
        records, _, row = self._find(index)
        try:
            sample = records.sample(row)
        except (BadSample, LostSource):
            return Outline(0, 0)
        return Outline(sample.text_bytes, len(sample.images))

    def _find(self, index: int) -> tuple[Records, ImageOpener, int]:
        which = bisect_right(self.ends, index)
        records, opener = self.sources[which]
        return records, opener, index - (self.ends[which - 1] if which else 0)


def build_dataset(
    section: DataSection,
    names: Sequence[str],
    encoder: Encoder,
    weights: Sequence[float] | None = None,
) -> SampleDataset:
    """Opens the files of `data.train` or `data.val`.

    Args:
        section: how they are read.
        names: the entries.
        encoder: turns a sample into tensors.
        weights: proportions of the entries (`data.weights`).

    Raises:
        ValueError: a file that is missing, unreadable or of an unknown format.
    """
    entries = [read_entry(name, section) for name in names]
    mixture = None
    if weights is not None:
        sizes = [sum(len(records) for records, _ in entry) for entry in entries]
        mixture = Mixture(sizes, weights, names)
    sources = [source for entry in entries for source in entry]
    return SampleDataset(sources, encoder, section.max_bad, mixture)


def read_entry(name: str, section: DataSection) -> list[tuple[Records, ImageOpener]]:
    """The files of one entry, each with the opener of its images."""
    if section.format == "dataset":
        return [(read_records(name, section), image_opener(Path(name).expanduser(), section))]
    return [
        (read_records(str(path), section), image_opener(path, section)) for path in files_of(name)
    ]


def read_records(name: str, section: DataSection) -> Records:
    """The reader of one file, by `data.format` or by its ending."""
    path = Path(name).expanduser()
    kind = kind_of(path, section.format)
    if kind == "dataset":
        return DatasetRecords(name, section.split)
    if kind in STREAMED:
        raise ValueError(
            f"{path}: can be read from front to end only; set data.streaming: true (and "
            "trainer.max_steps)"
        )
    return LlavaRecords(path) if kind == "llava" else JsonlRecords(path)


def image_opener(path: Path, section: DataSection) -> ImageOpener:
    """Opens the images of a data file, relative to `data.image_root` or to the file's folder."""
    if section.image_root is not None:
        root = Path(section.image_root).expanduser()
        if not root.is_dir():
            raise ValueError(f"data.image_root: no such folder: {root}")
        return ImageOpener(root, strict=True)
    return ImageOpener(path if path.is_dir() else path.parent, strict=False)
