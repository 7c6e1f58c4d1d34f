"""Two calls in one folder: the second is told, and an end of any kind lets go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from itprune.evaluating.answers import Answers
from itprune.evaluating.claim import Claim
from tests.evaluating.conftest import case_file
from train.together import wait

HOLDS = """
import sys
from pathlib import Path
from itprune.evaluating.claim import Claim
claim = Claim(Path(sys.argv[1]))
claim.alone()
claim.shared()
print("here", flush=True)
sys.stdin.read()
"""


def test_a_second_call_is_told_until_the_first_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"here\n"
        claim = Claim(tmp_path)
        with pytest.raises(ValueError, match="another `itprune eval` is at work here"):
            claim.alone()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        claim.alone()
    claim.release()


def test_processes_of_one_call_share_it_and_an_error_lets_go(tmp_path: Path) -> None:
    first, second, other = Claim(tmp_path), Claim(tmp_path), Claim(tmp_path)
    first.alone()
    first.shared()
    second.shared()
    first.release()
    with pytest.raises(ValueError, match="processes of one whose launcher was killed"):
        other.alone()
    with pytest.raises(RuntimeError, match="broken"), second.kept():
        raise RuntimeError("broken")
    other.alone()
    other.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        Claim(tmp_path / "gone").alone()


def test_eval_asks_and_changes_nothing_where_another_is_at_work(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    assert evaluate("--keep", "0.5", "--limit", "2") == 0
    path = case_file(tmp_path, "dense")
    other = Claim(path.parent)
    other.alone()  # the call above has let go
    part = path.with_name(f"{path.name}.rank1")
    part.write_text('{"id": "half a li')
    with pytest.raises(ValueError, match="another `itprune eval` is at work"):
        evaluate("--keep", "0.5", "--limit", "2")
    assert part.exists()
    other.release()
    assert evaluate("--keep", "0.5", "--limit", "2") == 0
    assert not part.exists()


def test_answers_that_another_process_wrote_elsewhere_are_missed_in_words(
    evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "append", lambda *_: None)
    with pytest.raises(ValueError, match="2 of 2 answers of dense at 1 are missing; all processes"):
        evaluate("--keep", "0.5", "--limit", "2")


def test_a_process_that_waits_for_one_that_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.barrier", closed)
    wait(1)
    with pytest.raises(ValueError, match="another process of this job has ended"):
        wait(2)
