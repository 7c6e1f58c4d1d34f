"""The measures of the data path run, and their records hold what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.bench.scale import main


@pytest.mark.parametrize("streaming", [False, True])
def test_memory_over_many_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        pytest.skip("needs /proc/PID/smaps_rollup")
    out = tmp_path / "m.json"
    options = ["--streaming"] if streaming else []
    assert main(["memory", "--lines", "4000", "--json", str(out), *options]) == 0
    record = json.loads(out.read_text())
    assert record["read"] in range(4000, 4000 + 256)
    assert set(record["processes"]) == {"main", "worker 1", "worker 2"}
    assert all(p["rss_peak_mb"] >= p["rss_start_mb"] > 0 for p in record["processes"].values())
    assert "above the main process's start" in capsys.readouterr().out


def test_index_and_loader(tmp_path: Path) -> None:
    out = tmp_path / "i.json"
    assert main(["index", "--lines", "500", "--json", str(out)]) == 0
    assert set(json.loads(out.read_text())["files"]) == {".jsonl", ".json"}
    assert main(["loader", "--shape", "tiny", "--samples", "32", "--repeats", "1",
                 "--workers", "1", "--json", str(out)]) == 0  # fmt: skip
    record = json.loads(out.read_text())
    data, step = record["loader"], record["step"]
    assert record["feeds"] == pytest.approx(data["samples_per_s"] / step["samples_per_s"])
    assert data["cpu_s_per_sample"] > 0
    with pytest.raises(SystemExit):
        main(["loader", "--samples", "0"])
