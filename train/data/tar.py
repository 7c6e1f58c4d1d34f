"""Tar shards as WebDataset lays them out: KEY.json holds a record, KEY.jpg and the like its images.

`datasets` has a reader of its own for them, used with `data.format: dataset`. It demands the same
members of every sample, so text-only rows end it, and so does one broken record or a shard that was
cut short; here the first is a sample like any other and the rest is one bad sample each.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from itprune.question import IMAGE
from train.data.messages import json_record, record_sample
from train.data.sample import BadSample, LostSource, Sample, image_list
from train.data.shards import EVERY, Part, Raw, Ticket, Turn, broken, turns

RECORD = "json"
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
CUT = "the archive ends in the middle of this sample; the rest of it is missing"
MANY = 4
"""Shards for each reader above which a shard is read by one reader alone."""


@dataclass(frozen=True)
class TarPart:
    """The samples of a shard, or every so-manieth of them."""

    path: Path
    turn: Turn = EVERY

    def tickets(self) -> Iterator[Ticket]:
        try:
            archive = tarfile.open(self.path, "r:")  # noqa: SIM115 - closed below
        except tarfile.TarError as error:
            yield partial(broken, str(self.path), f"no tar archive ({error})")
            return
        except OSError as error:
            raise LostSource(f"{self.path}: cannot read the data ({error.strerror})") from None
        with archive:
            for number, (key, members) in enumerate(self._groups(archive)):
                if self.turn.takes(number):
                    yield partial(self._read, archive, key, members)

    def _groups(self, archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
        """Members of the same key, one behind the other; none where the archive is cut short."""
        key, members = "", list[tarfile.TarInfo]()
        try:
            for member in archive:
                found = key_of(member.name)[0]
                if not member.isfile() or member.issparse():  # few bytes may stand for terabytes
                    continue
                if members and found != key:
                    yield key, members
                    members = []
                key = found
                members.append(member)
            whole = _ends(archive)
        except (tarfile.ReadError, ValueError, OverflowError):  # a place no file can have
            whole, members = False, []
        if members:
            yield key, members
        if not whole:
            yield key, []

    def _read(self, archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]) -> Raw:
        where = f"{self.path}, {key}"
        try:
            files = {m.name: _content(archive, m) for m in members if kind_of(m.name) is not None}
        except tarfile.ReadError:
            return broken(where, CUT)
        return Raw(where, partial(tar_sample, files)) if members else broken(where, CUT)


def tar_parts(paths: list[Path], readers: int) -> list[Part]:
    """Deals out shards; few ones are walked by all readers, which read only their own samples.

    Raises:
        ValueError: the first shard is no archive, or holds no record.
    """
    _check(paths[0])
    if len(paths) >= MANY * readers:
        return [TarPart(path) for path in paths]
    return [TarPart(path, turn) for path in paths for turn in turns(readers)]


def tar_sample(files: Mapping[str, bytes]) -> Sample:
    """The sample of one key: its record, with the images it names."""
    records = [data for name, data in files.items() if kind_of(name) == RECORD]
    if len(records) != 1:
        raise BadSample("no .json beside its images" if not records else "more than one .json")
    pictures = {name: data for name, data in files.items() if kind_of(name) != RECORD}
    return record_sample(with_pictures(json_record(records[0]), pictures))


def with_pictures(record: Any, pictures: Mapping[str, Any]) -> Any:
    """A record whose image names are replaced by the members they mean.

    A name means the member of that name, else the one with the same last part, else, for a lone
    image, the lone member; a record that names none has its members in their order.
    """
    if not isinstance(record, dict) or not pictures:
        return record
    field = "images" if record.get("images") is not None else "image"
    names = image_list(record.get(field))
    if not names:
        told = str(record)
        names = tuple(pictures) if IMAGE in told or "'type': 'image'" in told else ()
    by_name = {PurePosixPath(name).name: data for name, data in pictures.items()}
    lone = next(iter(pictures.values())) if len(pictures) == len(names) == 1 else None

    def meant(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        return pictures.get(name, by_name.get(PurePosixPath(name).name, lone or name))

    return {**record, field: [meant(name) for name in names]}


def row_sample(row: Mapping[str, Any]) -> Sample:
    """The sample of a row that `datasets` reads: columns of a record, or of a shard's members."""
    if RECORD not in row or "__key__" not in row:
        return record_sample(row)
    members = {f"{row['__key__']}.{n}": v for n, v in row.items() if v and kind_of(f".{n}")}
    pictures = {name: data for name, data in members.items() if kind_of(name) != RECORD}
    return record_sample(with_pictures(row[RECORD], pictures))


def key_of(name: str) -> tuple[str, str]:
    """The sample a member belongs to and the rest of its name: `a/b.c.jpg` is (a/b, c.jpg)."""
    folder, slash, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    return folder + slash + key, rest


def kind_of(name: str) -> str | None:
    """json, an image's ending, or None for a member that is not read."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending == RECORD or ending in PICTURES else None


def _ends(archive: tarfile.TarFile) -> bool:
    """Whether the mark of an archive's end stands where its last member ends: `tarfile` takes a
    damaged header, or the end of the file, for one."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # only regular files are asked for
    with file:
        return file.read()


def _check(path: Path) -> None:
    """Whether the first samples hold a record at all."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for member, _ in zip(archive, range(64), strict=False)]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: no tar archive ({error})") from None
    if not any(kind_of(name) == RECORD for name in names):
        raise ValueError(
            f"{path}: a shard needs a KEY.json beside the KEY.jpg of each sample; its first "
            f"members are {', '.join(names[:3]) or 'none'}"
        )
