"""Any `datasets` dataset with the columns of a LLaVA or a messages record.

A saved folder, arrow or parquet files, or a name on the hub. Rows are read from the memory map when
they are asked for; images may be paths, bytes or an Image column, which stays undecoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.messages import record_sample
from train.data.sample import BadSample, Sample

STREAMED = {".parquet": "parquet", ".tar": "webdataset"}
"""Endings of local files that `datasets` streams, and what it calls their reader."""
RECORD = "json"
"""Column of the record in rows of tar shards."""


class DatasetRecords:
    """Random access to the rows of a `datasets` dataset.

    Raises:
        ValueError: it cannot be loaded, has no such split, or lacks the columns.
    """

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        rows = _load(name, split)
        check_columns(name, rows.column_names)
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def sample(self, index: int) -> Sample:
        try:
            row = self._rows[index].to_pylist()[0]
        except (OSError, ValueError) as error:
            raise BadSample(f"the row cannot be read ({error})") from None
        return record_sample(row)


def check_columns(name: str, columns: Sequence[str]) -> None:
    """Raises ValueError where there is no column of conversations."""
    if "messages" not in columns and "conversations" not in columns:
        raise ValueError(
            f"{name}: needs a column `messages` (with `images`) or `conversations` (with "
            f"`image`), has {', '.join(columns)}"
        )


def _load(name: str, split: str) -> Any:
    import datasets

    path = Path(name).expanduser()
    try:
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f"has no split {split!r}, has {', '.join(splits)}")
            return splits[split]
        if path.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(path))
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        return datasets.load_dataset(name, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}: cannot load the dataset ({_reason(error)})") from None


def open_stream(name: str, split: str) -> Any | None:
    """The rows as a stream of `datasets`: parquet files, tar shards or a name on the hub; None for
    what lies here as arrow, whose rows are read where they are.

    Raises:
        ValueError: it cannot be opened, or lacks the columns.
    """
    import datasets

    path = Path(name).expanduser()
    builder = STREAMED.get(path.suffix)
    if builder is None and (path.suffix == ".arrow" or _is_saved(path)):
        return None
    try:
        if builder is not None:
            rows = datasets.load_dataset(
                builder, data_files={"train": [str(path)]}, split="train", streaming=True
            )
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        columns = rows.column_names
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}: cannot load the dataset ({_reason(error)})") from None
    if columns is not None and RECORD not in columns:
        check_columns(name, columns)
    return rows


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
