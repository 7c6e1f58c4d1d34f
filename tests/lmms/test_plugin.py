"""The real `lmms-eval` asks the bundled model through its plug-in mechanism."""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import main
from tests.lmms.inside import ROOT, Inside, make
from train.scenes import write_dataset

MODEL = ROOT / "assets" / "tiny-llava"
TASKS = ROOT / "launch" / "lmms_eval"
METHOD = ("visionzip", "0.25")
pytestmark = pytest.mark.xdist_group("lmms")  # one worker makes the environment


def test_the_registry_finds_us_by_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["itprune"].partition(":")
    assert callable(vars(importlib.import_module(module))[name])  # though lmms-eval is not here


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    work = tmp_path_factory.mktemp("lmms")
    write_dataset(work / "data" / "scenes", train=2, val=20, seed=3)
    return make(work / "environment", work)


def lmms_eval(inside: Inside, name: str, *words: str, launcher: Sequence[str] = ()) -> Path:
    """Runs both local tasks; the folder of the results."""
    method, keep = METHOD
    done = inside.run(
        inside.python, *(launcher or ("-m", "lmms_eval")),
        *("--model", "itprune", "--tasks", "scenes,scenes_choice", "--include_path", str(TASKS)),
        *("--model_args", f"pretrained={MODEL},method={method},keep={keep},dtype=float32"),
        *("--batch_size", "3", "--output_path", name, "--log_samples", *words),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = list((inside.work / name).glob("*/*_results.json"))
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return found[0].parent


def samples(folder: Path, task: str) -> dict[int, Any]:
    """What came back, by document."""
    (file,) = folder.glob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["doc_id"]: line for line in lines}


def results(folder: Path) -> Any:
    (file,) = folder.glob("*_results.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def alone(inside: Inside) -> Path:
    """The results of one process, from the command a user types."""
    return lmms_eval(inside, "alone", launcher=[str(inside.folder / "bin" / "lmms-eval")])


def infer(work: Path, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of `itprune infer` to the same questions."""
    keys = ("image",)
    lines = [
        {"prompt": d["conversations"][0]["value"], **{k: d[k] for k in keys if d.get(k)}}
        for d in documents
    ]
    asked, given = work / "data" / "scenes" / "asked.jsonl", work / "answers.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    method, keep = METHOD
    status = main([
        "infer", "--model", str(MODEL), "--jsonl", str(asked), "--output", str(given),
        "--method", method, "--keep", keep, "--max-new-tokens", "16", "--device", "cpu", "--quiet",
    ])  # fmt: skip
    assert status == 0
    return [json.loads(line) for line in given.read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_those_of_infer(inside: Inside, alone: Path) -> None:
    documents = json.loads((inside.work / "data" / "scenes" / "val.json").read_text())
    expected = infer(inside.work, documents)
    found = samples(alone, "scenes")
    assert len(found) == len(expected) == 20
    for index, answer in enumerate(expected):
        assert found[index]["filtered_resps"] == answer["answer"]
        counts = {"input_tokens": answer["tokens_in"], "output_tokens": answer["tokens_out"]}
        assert found[index]["token_counts"] == [counts]
    seeing = [a for a in expected if a["visual_in"]]
    told = results(alone)["throughput"]
    assert 0 < len(seeing) < 20
    for name, key in (("visual_tokens_in", "visual_in"), ("visual_tokens_llm", "visual_stage1")):
        mean = sum(a[key] for a in seeing) / len(seeing)
        assert told[f"avg_{name}"] == pytest.approx(mean)
    kept = sum(a["visual_layer_average"] for a in seeing) / len(seeing)
    assert told["avg_visual_share_kept"] == pytest.approx(kept)
    assert told["avg_visual_share_kept"] < 0.3
    assert told["avg_questions_failed"] == 0


@pytest.mark.slow
def test_multiple_choice_takes_the_likeliest_answer(alone: Path) -> None:
    answered, chosen = samples(alone, "scenes"), samples(alone, "scenes_choice")
    assert len(chosen) == 20
    right = 0
    for index, choice in chosen.items():
        losses = [float(pair[0]) for pair in choice["filtered_resps"]]
        own = [pair[1] == "True" for pair in choice["filtered_resps"]]
        if any(own):  # what the model would say itself is the likeliest
            assert losses[own.index(True)] == min(losses)
            answer = answered[index]
            said_right = answer["filtered_resps"] == answer["target"]
            assert choice["acc"] == float(said_right)
        right += choice["acc"]
    assert results(alone)["results"]["scenes_choice"]["acc,none"] == pytest.approx(right / 20)


@pytest.mark.slow
def test_two_processes_give_the_same_answers(inside: Inside, alone: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file",
                str(ROOT / "launch" / "accelerate" / "cpu2.yaml"), "-m", "lmms_eval"]  # fmt: skip
    both = lmms_eval(inside, "both", launcher=launcher)
    for task in ("scenes", "scenes_choice"):
        one, two = samples(alone, task), samples(both, task)
        assert two.keys() == one.keys()
        if task == "scenes":
            assert all(two[i]["filtered_resps"] == one[i]["filtered_resps"] for i in one)
    for task, figure in (("scenes", "scenes_exact_match,none"), ("scenes_choice", "acc,none")):
        both_figure, own = (results(run)["results"][task][figure] for run in (both, alone))
        assert both_figure == pytest.approx(own)
    assert results(both)["throughput"]["avg_questions_answered"] == 10


@pytest.mark.slow
def test_the_model_class_inside(inside: Inside) -> None:
    done = inside.run(
        inside.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0",
        "tests/lmms/class_inside.py", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
