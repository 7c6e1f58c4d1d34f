"""Any `datasets` dataset with the columns of a LLaVA or a messages record.

A saved folder, arrow or parquet files, or a name on the hub. Rows are read from the memory map when
they are asked for; images may be paths, bytes or an Image column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from train.data.messages import record_sample
from train.data.sample import BadSample, Sample


class DatasetRecords:
    """Random access to the rows of a `datasets` dataset.

    Raises:
        ValueError: it cannot be loaded, has no such split, or lacks the columns.
    """

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self._rows = _load(name, split)
        columns = self._rows.column_names
        if "messages" not in columns and "conversations" not in columns:
            raise ValueError(
                f"{name}: needs a column `messages` (with `images`) or `conversations` (with "
                f"`image`), has {', '.join(columns)}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def sample(self, index: int) -> Sample:
        try:
            row = self._rows[index]
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise BadSample(f"the row cannot be read ({error})") from None
        return record_sample(row)


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: cannot load the dataset ({reason})") from None
