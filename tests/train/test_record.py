"""run.json: what a run leaves behind, however it ends, and that it never fails one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from tests.train.helpers import history, losses, recipe_values, train_here, write_data, write_recipe
from tests.train.test_faults_launch import Running, recipe
from train import surroundings
from train.fingerprint import BLOCK, END, SAMPLE, fingerprints
from train.guards.progress import Progress
from train.guards.stopping import StopRequest
from train.guards.watchdog import Watchdog
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.record import EVERY, LOST, Record, earlier, fate
from train.run import run
from train.surroundings import commit, launcher, without_secrets

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
SAVE = ("trainer.save_strategy=steps", "trainer.save_steps=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("record"))


def attempts(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "run.json").read_text())["attempts"]
    return found


def test_a_finished_run_tells_everything(
    tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    output = train_here(
        tiny_llava_folder, data, tmp_path / "out", "prune.keep=0.4", f"data.val={data}",
        "eval.keep=[0.4,1.0]", "trainer.eval_strategy=steps", "trainer.eval_steps=2", *SAVE,
    )  # fmt: skip
    (one,) = attempts(output)
    assert one["outcome"] == {"state": "finished", "step": 4, "sentence": None}
    assert one["started"] <= one["ended"]
    assert all(re.fullmatch(r"[-\d]+T[:\d]+\+00:00", one[k]) for k in ("started", "ended", "seen"))
    assert one["recipe"] == load_recipe(output / "recipe.yaml").to_dict()
    assert set(one["versions"]) >= {
        "itprune",
        "torch",
        "transformers",
        "peft",
        "python",
        "accelerate",
    }
    assert one["machine"]["device"] == "cpu"
    assert (one["processes"], one["launcher"], one["from_checkpoint"]) == (1, "python", None)
    assert one["samples"] == {"train": 24, "val": 24}
    whole = {
        "name": str(data),
        "bytes": data.stat().st_size,
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "of": "the whole file",
    }
    assert one["data"] == {"train": [whole], "val": [whole]}
    assert one["metrics"]["loss"] == {"last": losses(output)[-1], "best": min(losses(output))}
    assert set(one["metrics"]["eval"]) == {
        f"{what}{keep}" for what in ("loss", "accuracy") for keep in ("", "_keep_0.4", "_keep_1.0")
    }
    assert one["metrics"]["peak_mb"] == max(step["peak_mb"] for step in history(output))
    assert one["metrics"]["step_time_s"] > 0
    assert one["metrics"]["tokens_per_s"] > 0
    assert not list(output.glob(".run.json*"))


def test_a_resumed_run_adds_an_attempt(tiny_llava_folder: Path, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    train_here(tiny_llava_folder, data, place, *SAVE, "trainer.max_steps=2")
    before = attempts(place)
    train_here(tiny_llava_folder, data, place, *SAVE, resume=True)
    first, second = attempts(place)
    assert [first] == before
    assert second["from_checkpoint"] == "checkpoint-2"
    assert second["outcome"]["step"] == 4
    assert second["recipe"]["trainer"]["max_steps"] == 4
    own = [step["step_time"] for step in history(place)[2:]]
    assert second["metrics"]["step_time_s"] == pytest.approx(sum(own) / 2, abs=1e-4)


def test_a_failed_run_says_why(tiny_llava_folder: Path, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(Exception, match="the loss is"):
        train_here(tiny_llava_folder, data, place, "trainer.learning_rate=1e30")
    (one,) = attempts(place)
    assert one["outcome"]["state"] == "failed"
    assert "the loss is" in one["outcome"]["sentence"]
    assert one["ended"] is not None


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_a_killed_and_a_stopped_run_go_on(
    tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    config = str(recipe(tiny_llava_folder, data, place, max_steps=12))
    with Running("python", config) as running:
        running.until("'loss'", times=7)
        running.signal(signal.SIGKILL)
        running.end()
    (killed,) = attempts(place)
    assert killed["outcome"] == {"state": "running", "step": 5, "sentence": None}
    assert killed["metrics"]["loss"] is not None  # written with the checkpoint of step 5
    assert killed["ended"] is None
    with Running("python", config, "trainer.run_name=https://me:pass@host/x") as running:
        running.until("'loss'", times=2)
        running.signal(signal.SIGTERM)
        running.end(128 + signal.SIGTERM)
    load = load_recipe(config, [])
    run(load, ALONE)
    lost, stopped, finished = attempts(place)
    assert lost == {**killed, "outcome": {"state": "lost", "step": 5, "sentence": LOST}}
    assert stopped["outcome"]["state"] == "stopped"
    assert re.match(r"stopped by SIGTERM after step \d+; ", stopped["outcome"]["sentence"])
    assert stopped["from_checkpoint"] == "checkpoint-5"
    assert "https://***@host/x" in stopped["command"][-1]
    assert "pass" not in json.dumps(stopped["command"])
    assert finished["outcome"]["state"] == "finished"
    assert finished["from_checkpoint"] == f"checkpoint-{stopped['outcome']['step']}"
    assert finished["outcome"]["step"] == 12


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_one_of_two_processes_records_that_the_other_was_lost(
    tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    config = recipe(tiny_llava_folder, data, place, per_device_train_batch_size=2, ddp_timeout=60)
    with Running("ddp 2", str(config)) as running:
        running.until("'loss'", times=7)
        (killed,) = running.processes(rank=1)
        killed.kill()
        error = running.until("^error")
        running.end()
    (one,) = attempts(place)
    assert (one["processes"], one["launcher"]) == (2, "accelerate")
    assert one["outcome"]["state"] == "failed"
    assert error == f"error: {one['outcome']['sentence']}"
    assert one["outcome"]["step"] >= 6


def test_a_record_that_cannot_be_written_fails_nothing(
    tiny_llava_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    (place / "run.json").mkdir(parents=True)
    (place / "run.json.damaged").mkdir()
    (place / "run.json.damaged" / "full").touch()
    train_here(tiny_llava_folder, data, place)
    assert len(history(place)) == 4
    assert capsys.readouterr().err.count("run.json: not complete") == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"attempts": 5}',
        '{"attempts": [5]}',
        '{"attempts": [{}]}',
        "\xff",
        "[" * 100_000,
    ],
    ids=range(7),
)
def test_a_damaged_record_is_put_aside(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    assert earlier(path) == []
    assert (tmp_path / "run.json.damaged").read_bytes() == text.encode("latin-1")
    assert earlier(path) == []


def test_only_rank_0_writes(tmp_path: Path) -> None:
    record = Record(None, {})
    record.end("finished", None)
    record.keep_up(TrainerState(), now=True)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_along_is_written_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path / "run.json", {"outcome": {"state": "running", "step": 0}})
    state = TrainerState(global_step=7, log_history=[{"step": 7, "loss": 2.0}])
    record.keep_up(state, now=True)
    state.global_step = 8
    record.keep_up(state, now=False)
    assert attempts(tmp_path)[0]["outcome"]["step"] == 7
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * EVERY)
    record.keep_up(state, now=False)
    assert attempts(tmp_path)[0]["outcome"]["step"] == 8
    assert attempts(tmp_path)[0]["metrics"]["loss"] == {"last": 2.0, "best": 2.0}


def test_ends_have_names() -> None:
    assert fate(KeyboardInterrupt()) == ("stopped", "interrupted before training began")
    assert fate(RuntimeError("a\nb")) == ("failed", "RuntimeError: a")
    assert fate(ValueError("what is wrong")) == ("failed", "what is wrong")


def test_the_watchdog_tells_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "run.json", {"outcome": {"state": "running", "step": 3}})
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    dog = Watchdog(Progress(0, lambda: ()), 1.0, StopRequest(), lambda: "kept", record.lost)
    dog._end("nothing moved")
    (one,) = attempts(tmp_path)
    assert one["outcome"]["state"] == "failed"
    assert one["outcome"]["sentence"] == capsys.readouterr().err.removeprefix("error: ").strip()
    assert ended == [1]


# ------------------------------------------------------------------------------- fingerprints
def test_large_files_are_sampled_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    content = bytearray(os.urandom(2 * END + 300_000))
    path.write_bytes(content)
    (one,) = fingerprints([str(path)], whole=1000)
    assert one["bytes"] == len(content)
    assert f"64 blocks of {BLOCK} bytes" in one["of"]
    for place in (0, END - 1, len(content) - 1, END + round(300_000 / 65)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprints([str(path)], whole=1000)[0]["sha256"] != one["sha256"]
    path.write_bytes(content)
    assert fingerprints([str(path)], whole=1000) == [one]


def test_many_files_are_sampled_whatever_stands_beside_them(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar"):
        (tmp_path / name).write_bytes(bytes(SAMPLE + 1))
    (tmp_path / "a-2.tar").write_bytes(bytes(SAMPLE))
    (tmp_path / "b.json").write_bytes(bytes(2 * SAMPLE))
    shards, alone = str(tmp_path / "a-*.tar"), str(tmp_path / "b.json")
    found = fingerprints([shards, alone], together=3 * SAMPLE)
    assert [one["of"] == "the whole file" for one in found] == [False, False, True, True]
    assert found == fingerprints([shards], together=3 * SAMPLE) + fingerprints([alone])


def test_patterns_and_folders_are_their_files(tmp_path: Path) -> None:
    for name in ("a-0.jsonl", "a-1.jsonl", "saved/state.json", "saved/data.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = fingerprints([f"{tmp_path}/a-*.jsonl", f"{tmp_path}/saved", "somebody/dataset"])
    names = ["a-0.jsonl", "a-1.jsonl", "saved/data.arrow", "saved/state.json"]
    assert [one["name"] for one in found] == [
        *(str(tmp_path / n) for n in names),
        "somebody/dataset",
    ]
    assert found[-1]["of"] == "no local file"
    assert found[-1]["sha256"] is None


# ------------------------------------------------------------------------------- surroundings
def test_commits_are_told_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    found = commit(tmp_path, ours=True)
    assert found is not None
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert found["dirty"] is False
    assert commit(tmp_path / "inside") == found
    assert commit(tmp_path / "inside", ours=True) is None
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == {**found, "dirty": True}
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a container
    assert commit(tmp_path) is None
    assert commit(tmp_path, ours=True) == {**found, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert commit(tmp_path) is None
    assert surroundings.code() == {"project": None, "working_directory": None}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["trainer.hub_token=abc"], ["trainer.hub_token=***"]),
        (["--token", "abc"], ["--token", "***"]),
        (["--api-key=abc", "x"], ["--api-key=***", "x"]),
        (["data.max_tokens_per_batch=64"], ["data.max_tokens_per_batch=64"]),
        (["--resume", "prune.keep=0.2"], ["--resume", "prune.keep=0.2"]),
        (["a.b={token: abc, c: 1}"], ["a.b={token: ***, c: 1}"]),
        (["hf_" + "a" * 20], ["***"]),
        (["data.train=https://me:word@host/x"], ["data.train=https://***@host/x"]),
        (["https://me:p@ss@host/x"], ["https://***@host/x"]),
        (["https://host/x?a=1&token=abc&b=2"], ["https://host/x?a=1&token=***&b=2"]),
        (["s3://b/x?X-Amz-Signature=abc"], ["s3://b/x?X-Amz-Signature=***"]),
        (["https://host/x?sv=1&sig=a%2Fb"], ["https://host/x?sv=1&sig=***"]),
        (["AWS_SECRET_ACCESS_KEY=abc"], ["AWS_SECRET_ACCESS_KEY=***"]),
        (['{"wandb_api_key": "a b", "c": 1}'], ['{"wandb_api_key": ***, "c": 1}']),
        (["Authorization: Bearer abc"], ["Authorization: ***"]),
        (["data.train=data/hf_llava_instruct_mixture.json"],) * 2,
        (["data.train=configs/tokens_and_keys.json"],) * 2,
    ],
)
def test_secrets_are_hidden(words: list[str], shown: list[str]) -> None:
    assert without_secrets(words) == shown


def test_no_secret_of_a_recipe_or_a_sentence_is_written(tmp_path: Path) -> None:
    secret = "https://me:word@host/x"
    attempt = {"recipe": {"trainer": {"run_name": secret, "hub_token": "word"}, "keep": [0.5]}}
    record = Record(tmp_path / "run.json", attempt)
    record.end("failed", f"cannot reach {secret}")
    (one,) = attempts(tmp_path)
    assert one["recipe"]["trainer"] == {"run_name": "https://***@host/x", "hub_token": "***"}
    assert one["recipe"]["keep"] == [0.5]
    assert one["outcome"]["sentence"] == "cannot reach https://***@host/x"
    assert "word" not in (tmp_path / "run.json").read_text()


def test_launchers_have_names() -> None:
    several = Launch(2, 0, by_deepspeed=True, accelerate_deepspeed=False)
    assert launcher(several, {}) == "deepspeed"
    assert launcher(ALONE, {"ACCELERATE_MIXED_PRECISION": "no"}) == "accelerate"
    assert launcher(ALONE, {"TORCHELASTIC_RUN_ID": "x"}) == "torchrun"
    assert launcher(ALONE, {}) == "python"


def test_values_of_the_recipe_are_plain(tmp_path: Path, tiny_llava_folder: Path) -> None:
    values = recipe_values(tiny_llava_folder, tmp_path / "d.json", tmp_path / "out")
    loaded = load_recipe(write_recipe(tmp_path / "r.yaml", values), ["prune.keep=0.3"])
    assert json.loads(json.dumps(loaded.to_dict()))["prune"]["keep"] == 0.3
