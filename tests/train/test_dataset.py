"""SampleDataset: bad samples are replaced the same way every time, counted, and never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_llava import build_processor
from tests.train.helpers import turn, write_data
from train.bad_samples import BadSamples
from train.data.collate import BAD, Collator
from train.data.dataset import SampleDataset, build_dataset
from train.data.encode import Encoder
from train.recipe.sections import DataSection


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder(build_processor(), 500)


def open_data(encode: Encoder, *paths: Path, **options: Any) -> SampleDataset:
    section = DataSection(train=tuple(map(str, paths)), **options)
    return build_dataset(section, section.train, encode)


def spoil(path: Path, index: int, **change: Any) -> None:
    records = json.loads(path.read_text())
    records[index] |= change
    path.write_text(json.dumps(records))


def test_several_files_make_one_dataset(tmp_path: Path, encode: Encoder) -> None:
    first, second = write_data(tmp_path / "a", 3), write_data(tmp_path / "b", 4, seed=1)
    both = open_data(encode, first, second)
    assert len(both) == 7
    assert torch.equal(both[5]["input_ids"], open_data(encode, second)[2]["input_ids"])


def test_a_bad_sample_is_replaced_by_the_next_good_one(tmp_path: Path, encode: Encoder) -> None:
    path = write_data(tmp_path, 6)
    spoil(path, 5, image="nowhere.png", conversations=[turn("human", "<image>"), turn("gpt", "a")])
    spoil(path, 0, conversations=[])
    data = open_data(encode, path, max_bad=0.5)
    got = data[5]
    assert [index for index, *_ in got[BAD]] == [5, 0]
    assert torch.equal(got["input_ids"], data[1]["input_ids"])
    assert data[1][BAD] == []
    assert "train.json, record 5" in got[BAD][0][1]


def test_too_many_in_a_row_give_up_without_a_batch(tmp_path: Path, encode: Encoder) -> None:
    path = write_data(tmp_path, 8)
    for i in range(3):
        spoil(path, i, image="nowhere.png")
    data = open_data(encode, path, max_bad=0.25)
    assert set(data[0]) == {BAD}
    assert len(data[0][BAD]) == 3
    batch = Collator(0)([data[0], data[5]])
    assert "input_ids" not in batch


def test_an_empty_file_is_an_error(tmp_path: Path, encode: Encoder) -> None:
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="hold no sample"):
        open_data(encode, tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"data.image_root: no such folder"):
        open_data(encode, write_data(tmp_path, 2), image_root=str(tmp_path / "x"))


def test_bad_samples_are_counted_once_reported_and_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(report, allowed=2, total=100, writes=True)
    bad.meet([(3, "f:3", "missing image x"), (3, "f:3", "missing image x")])
    bad.settle()
    bad.meet([(3, "f:3", "missing image x"), (7, "f:7", "empty")])
    bad.settle()
    assert len(bad) == 2
    assert [json.loads(line)["where"] for line in report.read_text().splitlines()] == ["f:3", "f:7"]
    assert "skipped f:3: missing image x" in capsys.readouterr().err
    again = BadSamples(report, allowed=2, total=100, writes=True)
    again.restore()
    again.meet([(7, "f:7", "empty")])
    again.settle()
    assert len(again) == 2
    again.meet([(8, "f:8", "empty")])
    with pytest.raises(ValueError, match="3 of 100 samples are bad, 2 are allowed"):
        again.settle()


def test_whichever_rank_gives_up_writes_the_report(tmp_path: Path) -> None:
    report = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(report, allowed=0, total=100, writes=False)
    found = [(3, "f:3", "missing image x")]
    bad.meet(found)
    with pytest.raises(ValueError, match=r"1 of 100 samples are bad.*f:3: missing image x"):
        bad.stop(found)
    assert json.loads(report.read_text())["where"] == "f:3"
