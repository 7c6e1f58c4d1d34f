"""Reading the files of benchmarks: fields of JSON, TSV row by row, Parquet in batches.

A benchmark in the wrong format is told by its first wrong entry: which file, which entry, what is
missing.
"""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from itprune.records import not_text

MOST = 64 * 2**20
"""Letters of one TSV field at most; an image in base64 is one field."""


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value, which must be a JSON object.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value


def as_list(value: Any, where: str) -> Sequence[Any]:
    """The value, which must be a JSON list.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where}: must be a JSON list, got {type(value).__name__}")
    return value


def text_of(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A field as text; a number is written out, as ids are numbers in some files.

    Raises:
        ValueError: it is missing or something else.
    """
    value = entry.get(key)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    found = "is missing" if value is None else f"must be text, got {type(value).__name__}"
    raise ValueError(f"{where}: `{key}` {found}")


def no_answer(where: str) -> ValueError:
    """What to raise for a question that cannot be scored."""
    return ValueError(
        f"{where}: has no answer to score with; test splits hold none, so take a split that does"
    )


def read_tsv(path: Path, columns: Sequence[str]) -> Generator[dict[str, str], None, None]:
    """The rows of a TSV file with a line of names; one is in memory at a time.

    Args:
        path: the file.
        columns: those it must have.

    Raises:
        ValueError: it cannot be read, lacks a column, or has a row of another shape.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _wide_fields():
            rows = csv.DictReader(file, dialect="excel-tab")
            absent = [name for name in columns if name not in (rows.fieldnames or ())]
            if absent:
                raise ValueError(f"{path}: not the expected TSV, it has no column {absent[0]!r}")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"{path}:{rows.line_num}: has another number of fields")
                yield row
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise not_text(path, error.object) from None
    except csv.Error as error:
        raise ValueError(f"{path}: not the expected TSV ({error})") from None


@contextmanager
def _wide_fields() -> Iterator[None]:
    """The csv module's limit of one field is meant for text; images are longer. Put back after."""
    before = csv.field_size_limit(MOST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, some at a time.

    Raises:
        ValueError: it cannot be read, or pyarrow is not there.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow; pip install 'itprune[train]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (ArrowInvalid, OSError):
        raise ValueError(f"{path}: not a readable Parquet file") from None
