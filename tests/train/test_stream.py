"""Streams: every sample in one place, passes without an end, and a run goes on where it stood."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_llava import build_processor
from tests.train.helpers import turn
from tests.train.stream_files import (
    MESSAGES,
    jpeg,
    line,
    record,
    shard,
    write_lines,
    write_tar,
)
from train.bad_samples import StreamedBadSamples
from train.data.collate import BAD, PLACES, Collator
from train.data.encode import Encoder
from train.data.files import DataFile
from train.data.sample import LostSource
from train.data.shards import LinesPart
from train.data.stream import StreamFeed, build_stream, fixed
from train.recipe.sections import DataSection

DRAWN = 2
"""Samples of a batch."""


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder(build_processor(), 200)


def open_feed(encode: Encoder, *names: Path | str, **options: Any) -> StreamFeed:
    placed = {name: options.pop(name) for name in ("rank", "world", "seed") if name in options}
    values = {"streaming": True, "workers": 0, "shuffle_buffer": 8, **options}
    section = DataSection(train=tuple(map(str, names)), **values)
    return build_stream(section, encode, Collator(0), fixed(DRAWN), **placed)


def lanes(encode: Encoder, *names: Path | str, world: int = 2, **options: Any) -> list[Any]:
    """What each reader of two ranks with two workers reads, without the processes."""
    feeds = [
        open_feed(encode, *names, rank=rank, world=world, workers=2, **options)
        for rank in range(world)
    ]
    sent = [pickle.loads(pickle.dumps(feed)) for feed in feeds]  # to workers that are spawned
    return [feed.lane(reader) for feed in sent for reader in range(2)]


def one_pass(lane: Any) -> list[str]:
    """Places of a lane's first pass."""
    return [raw.where for raw, _ in lane._pass(0, 0, 0)]


def places(feed: StreamFeed, count: int, done: int = 0) -> list[list[str]]:
    return [batch[PLACES] for batch in islice(feed.batches(done), count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 40 samples as every kind of file that can be streamed."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("stream")
    write_lines(root / "a.jsonl", 40)
    (root / "b.jsonl.gz").write_bytes(gzip.compress((root / "a.jsonl").read_bytes()))
    asked = [turn("human", "What?"), turn("gpt", "A dog.")]
    (root / "c.json").write_text(json.dumps([{"conversations": asked}] * 40))
    rows = [{"messages": MESSAGES["messages"]} for _ in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(root / "d.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(root / "saved")
    (root / "tars").mkdir()
    for i in range(4):
        shard(root / f"tars/shards-{i:03}.tar", range(10 * i, 10 * i + 10))
    return root


SOURCES = ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "saved", "tars",
           "tars/shards-{000..003}.tar", "tars/*-00[0-3].tar"]  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_sample_has_one_reader_in_each_pass(folder: Path, encode: Encoder, name: str) -> None:
    passes = [one_pass(lane) for lane in lanes(encode, folder / name)]
    assert min(map(len, passes)) >= 5
    found = Counter(where for part in passes for where in part)
    assert len(found) == 40
    assert set(found.values()) == {1}
    again = [[raw.where for raw, _ in lane._pass(0, 1, 0)] for lane in lanes(encode, folder / name)]
    assert sorted(found) == sorted(where for part in again for where in part)
    assert again != passes


@pytest.mark.parametrize(
    ("name", "workers"), [("a.jsonl", 0), ("tars", 0), ("d.parquet", 2), ("tars", 2)]
)
def test_a_stream_goes_on_with_the_batches_of_an_unbroken_one(
    folder: Path, encode: Encoder, name: str, workers: int
) -> None:
    options = {"workers": workers, "seed": 3}
    whole = places(open_feed(encode, folder / name, **options), 25)
    broken = open_feed(encode, folder / name, **options)
    for done in (3, 11):  # the second time in the middle of a later pass
        places(broken, done - 3 if done > 3 else 3, done if done > 3 else 0)
        state = json.loads(json.dumps(broken.state_dict()))
        broken = open_feed(encode, folder / name, **options)
        broken.load_state_dict(state)
    assert places(broken, 14, 11) == whole[11:]
    assert len({where for batch in whole[:10] for where in batch}) == 20  # a window in its order
    assert broken.seen == 50


def test_every_rank_finds_its_own_place_again(folder: Path, encode: Encoder) -> None:
    def ranks() -> list[StreamFeed]:
        return [open_feed(encode, folder / "tars", rank=rank, world=2) for rank in (0, 1)]

    whole = [places(feed, 9) for feed in ranks()]
    assert not {w for batch in whole[0] for w in batch} & {w for b in whole[1] for w in b}
    feeds = ranks()
    for feed in feeds:
        places(feed, 4)
    state = {"readers": 1, "ranks": [feed.position() for feed in feeds]}
    again = ranks()
    for feed, expected in zip(again, whole, strict=True):
        feed.load_state_dict(json.loads(json.dumps(state)))
        assert places(feed, 5, 4) == expected[4:]


def test_what_was_had_is_passed_over_without_decoding(
    folder: Path, encode: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = open_feed(encode, folder / "tars")
    places(feed, 12)
    again = open_feed(encode, folder / "tars")
    again.load_state_dict(feed.state_dict())
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    assert len(places(again, 1, 12)[0]) == DRAWN
    assert len(opened) <= DRAWN


def test_other_readers_are_refused(folder: Path, encode: Encoder) -> None:
    feed = open_feed(encode, folder / "a.jsonl", workers=2)
    for changed in ({"workers": 3}, {"workers": 2, "world": 2}):
        with pytest.raises(ValueError, match=r"read by 1 process.* with 2 reader.* go on with"):
            open_feed(encode, folder / "a.jsonl", **changed).load_state_dict(feed.state_dict())
    with pytest.raises(ValueError, match="does not tell the place"):
        places(feed, 1, done=4)


def test_streams_mix_in_their_proportions(tmp_path: Path, encode: Encoder) -> None:
    big, small = write_lines(tmp_path / "big.jsonl", 50), write_lines(tmp_path / "small.jsonl", 4)
    feed = open_feed(encode, big, small, weights=(3, 1))
    drawn = [where for batch in places(feed, 16) for where in batch]
    assert Counter(Path(where.split(":")[0]).name for where in drawn) == {
        "big.jsonl": 24,
        "small.jsonl": 8,
    }
    of_small = [where for where in drawn if "small" in where]
    assert len(set(of_small[:4])) == len(set(of_small[4:])) == 4
    pooled = open_feed(encode, big, small)
    once = [where for batch in places(pooled, 27) for where in batch]
    assert len(set(once)) == 54


def test_lines_are_shared_out_wherever_a_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(line(i).strip() + " " * (i % 13) for i in range(30)) + "\n\n" + "{}")
    file = DataFile(path)
    for cut in (1, 7, 95, 96, 97, 500, file.size - 1):
        cuts = [*range(0, file.size, cut), file.size]
        parts = [LinesPart(file, a, b) for a, b in pairwise(cuts)]
        if cut == 1:
            parts = parts[:400]
        found = [ticket() for part in parts for ticket in part.tickets()]
        assert len({raw.where for raw in found}) == len(found)
        if cut > 1:
            assert len(found) == 31


def bad_of(feed: StreamFeed, count: int) -> dict[str, str]:
    batches: Iterator[dict[str, Any]] = islice(feed.batches(0), count)
    return {where: reason for batch in batches for _, where, reason in batch[BAD]}


def test_broken_shards_are_bad_samples(tmp_path: Path, encode: Encoder) -> None:
    whole = shard(tmp_path / "s-0.tar", range(6))
    data = whole.read_bytes()
    (tmp_path / "s-1.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "s-2.tar").write_bytes(b"")
    (tmp_path / "s-3.tar").write_bytes(b"no archive" * 100)
    write_tar(
        tmp_path / "s-4.tar",
        {"a.json": b"{oops", "b.jpg": jpeg(), "c.json": record("c.jpg"), "c.jpg": jpeg()[:99],
         "d.json": record("other.jpg"), "e.json": record(["e.0.jpg"]), "e.0.jpg": jpeg(),
         "f.txt": b"x", "f.json": record("https://x/f.jpg")},
    )  # fmt: skip
    bad = bad_of(open_feed(encode, tmp_path, max_bad=1.0, shuffle_buffer=100), 20)
    reasons = {Path(where.split(",")[0]).name + where[-2:]: why for where, why in bad.items()}
    assert "middle of this sample" in next(v for k, v in reasons.items() if "s-1" in k)
    assert "no tar archive" in next(v for k, v in reasons.items() if "s-3" in k)
    for key, reason in [("a", "not valid JSON"), ("b", "no .json beside"), ("c", "unreadable"),
                        ("d", "missing image"), ("f", "download it first")]:  # fmt: skip
        assert reason in reasons[f"s-4.tar {key}"]
    assert "s-4.tar e" not in reasons
    assert not any("s-0" in key for key in reasons)


def test_a_compressed_file_that_ends_early_is_one_bad_sample(
    tmp_path: Path, encode: Encoder
) -> None:
    data = gzip.compress("".join(line(i * 7919) for i in range(400)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    bad = bad_of(open_feed(encode, tmp_path / "a.jsonl.gz", max_bad=1.0, shuffle_buffer=9), 210)
    assert len(bad) == 1
    assert "ends or breaks here" in next(iter(bad.values()))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none-{00..03}.tar", "4 of its 4 files are missing, such as .*none-00.tar"),
        ("none*.jsonl", "the pattern matches no file"),
        ("none.jsonl", "no such data file"),
        ("pictures.tar", "needs a KEY.json beside .* its first members are 0.jpg"),
        ("text.tar", "no tar archive"),
        ("empty.jsonl", "the files hold no sample"),
        ("{pictures.tar,empty.jsonl}", "make them two entries"),
        ("table.parquet", "needs a column `messages`"),
        ("a.tar.gz", "of no known format"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(
    tmp_path: Path, encode: Encoder, name: str, sentence: str
) -> None:
    datasets = pytest.importorskip("datasets")
    write_tar(tmp_path / "pictures.tar", {"0.jpg": jpeg(), "1.jpg": jpeg()})
    (tmp_path / "text.tar").write_text("text")
    (tmp_path / "a.tar.gz").write_text("text")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=sentence) as caught:
        open_feed(encode, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_datasets_reads_tar_shards_too(folder: Path, encode: Encoder, tmp_path: Path) -> None:
    members = {}
    for i in range(6):
        members |= {f"{i}.jpg": jpeg(), f"{i}.json": record(f"{i}.jpg")}
    path = write_tar(tmp_path / "a.tar", members)
    feed = open_feed(encode, path, format="dataset")
    batch = next(iter(feed.batches(0)))
    assert not batch[BAD]
    assert batch["pixel_values"].shape[0] == DRAWN
    own = next(iter(open_feed(encode, path, format="llava").batches(0)))
    assert torch.equal(own["pixel_values"], batch["pixel_values"])


def test_readers_without_a_sample_end_the_run(tmp_path: Path, encode: Encoder) -> None:
    feed = open_feed(encode, write_lines(tmp_path / "a.jsonl", 2), workers=3)
    found = [next(feed.lane(reader).samples()) for reader in range(3)]
    (empty,) = [sample for sample in found if "input_ids" not in sample]
    assert "of 3 finds no record in entry 1" in empty[BAD][0][2]


def test_a_stream_of_bad_samples_gives_up(tmp_path: Path, encode: Encoder) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n" * 5)
    feed = open_feed(encode, tmp_path / "a.jsonl")
    batches = list(feed.batches(0))
    assert len(batches) == 1
    assert "input_ids" not in batches[0]
    bad = StreamedBadSamples(tmp_path / "bad.jsonl", 0.002, lambda: feed.seen, writes=True)
    bad.meet(batches[0][BAD])
    with pytest.raises(ValueError, match=r"5 of the 1000 samples read so far are bad.*a.jsonl:\d"):
        bad.stop(batches[0][BAD])


def test_bad_samples_of_a_stream_are_judged_among_those_seen(tmp_path: Path) -> None:
    seen = 10
    bad = StreamedBadSamples(tmp_path / "bad.jsonl", 0.002, lambda: seen, writes=True)
    bad.meet([(i, f"a:{i}", "broken") for i in range(2)])
    bad.settle()  # two of ten, but too early to tell
    bad.meet([(3, "a:3", "broken")])
    with pytest.raises(ValueError, match="3 of the 10 samples read so far are bad"):
        bad.settle()
    seen = 5000
    bad.settle()


def test_a_file_that_changes_is_one_sentence(tmp_path: Path, encode: Encoder) -> None:
    path = write_lines(tmp_path / "a.jsonl", 9)
    feed = open_feed(encode, path)
    path.write_text(line(1))
    batch = next(iter(feed.batches(0)))
    assert "a.jsonl: has changed since this run opened it" in batch[BAD][0][2]
    file = pickle.loads(pickle.dumps(DataFile(path)))
    path.unlink()
    with pytest.raises(LostSource, match="cannot read the data"):
        file.read(0, 1)


def test_the_first_samples_serve_for_calibration(folder: Path, encode: Encoder) -> None:
    names = [folder / "tars", folder / "a.jsonl"]
    firsts = [
        open_feed(encode, *names, rank=rank, world=2, weights=(1, 2)).first(8) for rank in (0, 1)
    ]
    assert len(firsts[0]) == 8
    one, two = ([data[i] for i in range(8)] for data in firsts)
    assert [sample[PLACES] for sample in one] == [sample[PLACES] for sample in two]
    assert sum("pixel_values" in sample for sample in one) >= 2
