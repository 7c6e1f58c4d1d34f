"""SampleDataset: any mix of data files as one map-style dataset that never stumbles.

A bad sample is replaced by the next good one. The replacement depends on the index alone, so every
rank keeps its batch shape, and a resumed run reads what an uninterrupted one would have read. What
was skipped travels with the batch to the trainer, which counts it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from train.data.collate import BAD
from train.data.encode import Encoder
from train.data.hub import DatasetRecords
from train.data.images import ImageOpener
from train.data.llava import LlavaRecords
from train.data.messages import JsonlRecords
from train.data.sample import BadSample, Records
from train.sections import DataSection

DATASET_ENDINGS = (".parquet", ".arrow")


class SampleDataset(Dataset[dict[str, Any]]):
    """Encoded samples of several sources.

    Args:
        sources: pairs of records and the opener of their images.
        encoder: turns a sample into tensors.
        max_bad: fraction of bad samples at which reading gives up.
    """

    def __init__(
        self, sources: Sequence[tuple[Records, ImageOpener]], encoder: Encoder, max_bad: float
    ) -> None:
        self.sources = list(sources)
        self.encoder = encoder
        self.ends = list(accumulate(len(records) for records, _ in self.sources))
        if not len(self):
            raise ValueError("data: the files hold no sample")
        self.allowed = int(max_bad * len(self))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded sample, or the next good one; only `bad` when there are too many bad ones."""
        bad: list[tuple[int, str, str]] = []
        for step in range(min(self.allowed + 1, len(self))):
            i = (index + step) % len(self)
            records, opener, row = self._find(i)
            try:
                encoded = self.encoder(records.sample(row), opener)
            except BadSample as error:
                bad.append((i, records.where(row), str(error)))
            else:
                return {**encoded, BAD: bad}
        return {BAD: bad}

    def _find(self, index: int) -> tuple[Records, ImageOpener, int]:
        which = bisect_right(self.ends, index)
        records, opener = self.sources[which]
        return records, opener, index - (self.ends[which - 1] if which else 0)


def build_dataset(section: DataSection, names: Sequence[str], encoder: Encoder) -> SampleDataset:
    """Opens the files of `data.train` or `data.val`.

    Raises:
        ValueError: a file that is missing, unreadable or of an unknown format.
    """
    sources = [(read_records(n, section), _opener(n, section)) for n in names]
    return SampleDataset(sources, encoder, section.max_bad)


def read_records(name: str, section: DataSection) -> Records:
    """The reader of one entry, by `data.format` or by its ending."""
    path = Path(name).expanduser()
    kind = section.format if section.format != "auto" else _guess(path)
    if kind == "dataset":
        return DatasetRecords(name, section.split)
    if not path.is_file():
        raise ValueError(f"{name}: no such data file")
    if kind == "llava" and path.suffix != ".jsonl":
        return LlavaRecords(path)
    return JsonlRecords(path)


def _guess(path: Path) -> str:
    if path.suffix == ".json":
        return "llava"
    if path.suffix == ".jsonl":
        return "messages"
    if path.suffix in DATASET_ENDINGS or path.is_dir():
        if path.suffix in DATASET_ENDINGS and not path.is_file():
            raise ValueError(f"{path}: no such data file")
        return "dataset"
    if len(path.parts) == 2 and not path.suffix and not path.is_absolute():
        return "dataset"
    raise ValueError(
        f"{path}: no such data file (LLaVA .json, messages .jsonl, .parquet, .arrow, a saved "
        "dataset's folder or a hub name)"
    )


def _opener(name: str, section: DataSection) -> ImageOpener:
    if section.image_root is not None:
        root = Path(section.image_root).expanduser()
        if not root.is_dir():
            raise ValueError(f"data.image_root: no such folder: {root}")
        return ImageOpener(root, strict=True)
    path = Path(name).expanduser()
    return ImageOpener(path if path.is_dir() else path.parent, strict=False)
