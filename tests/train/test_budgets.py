"""Many budgets, one checkpoint: steps that draw theirs, evaluations at several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.attach import base_model
from itprune.cli import main
from itprune.question import ImageFolder, Question
from tests.train.helpers import history, losses, recipe_values, write_data, write_recipe
from train.budgets import CURVE, Evaluation
from train.data.collate import BAD, PLACES, Collator
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.recipe.sections import DataSection
from train.run import run
from train.scenes import answers, write_dataset
from train.supervised import supervised
from train.trainer import PruneTrainer

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
TINY = Path(__file__).parents[2] / "assets/tiny-llava"
LIST = "prune.keep=[0.4, 0.2, 1.0]"
EVAL = ("trainer.eval_strategy=steps", "trainer.eval_steps=2", "eval.keep=[0.4, 1.0]")


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs the small recipe with some overrides; returns the output folder."""
    data = write_data(tmp_path / "data")
    val = write_data(tmp_path / "val", 7, seed=5)

    def start(*overrides: str, name: str = "out") -> Path:
        values = recipe_values(tiny_llava_folder, data, tmp_path / name)
        values["data"]["val"] = str(val)
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, ALONE)
        return recipe.output

    return start


def until(sample: dict[str, Any], turn: int) -> dict[str, Any]:
    """A record without what follows an answer."""
    return {**sample, "conversations": sample["conversations"][: 2 * turn + 2]}


def evaluations(output: Path) -> list[dict[str, Any]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


# ----------------------------------------------------------------------------------- drawn steps
def test_every_step_draws_and_a_resumed_run_draws_the_same(train: Any) -> None:
    options = (LIST, "trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=3",
               "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=2",
               "trainer.seed=3")  # fmt: skip
    output = train(*options)
    steps = history(output)
    config = load_recipe(output / "recipe.yaml").prune
    assert config is not None
    assert [step["keep"] for step in steps] == [config.keep_at(i, 6, seed=3) for i in range(6)]
    assert {step["keep"] for step in steps} == {0.4, 0.2, 1.0}
    assert all((step["layer_average"] == 1.0) == (step["keep"] == 1.0) for step in steps)
    expected = losses(output)
    for name in ("checkpoint-6", "trainer_state.json"):
        path = output / name
        path.unlink() if path.is_file() else path.rename(output.parent / name)
    assert losses(train(*options)) == expected
    record = json.loads((output / "pruner.json").read_text())
    assert record["prune"]["keep"] == [0.4, 0.2, 1.0]
    assert any(stage.endswith("@0.2") for stage in record["calibration"]["curves"])
    loaded = load_pretrained(output)
    assert loaded.attached is not None
    assert loaded.attached.keep == 0.4


# ------------------------------------------------------------------------------------ evaluation
def test_an_evaluation_measures_every_budget_and_leaves_no_trace(
    train: Any, tmp_path: Path
) -> None:
    base = ("prune.keep=0.4", "lora.dropout=0.2", "trainer.save_strategy=steps",
            "trainer.save_steps=2", "trainer.per_device_eval_batch_size=3",
            "trainer.report_to=tensorboard")  # fmt: skip
    best = ("trainer.load_best_model_at_end=true",
            "trainer.metric_for_best_model=eval_loss_keep_1.0")  # fmt: skip
    output = train(*base, *EVAL, *best)
    plain = train(*base, name="plain")
    assert losses(output) == losses(plain)  # totals, random numbers, keep: as if nothing had been
    assert [s["kept_stage1"] for s in history(output)] == [s["kept_stage1"] for s in history(plain)]
    found = evaluations(output)
    assert [entry["step"] for entry in found] == [2, 4]
    for entry in found:
        assert entry["eval_loss"] == entry["eval_loss_keep_0.4"] != entry["eval_loss_keep_1.0"]
        assert entry["eval_accuracy"] == entry["eval_accuracy_keep_0.4"]
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_loss_keep_1.0"] for entry in found)

    (curve,) = output.rglob(f"{CURVE}/step_4")
    events = EventAccumulator(str(curve))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars(CURVE)}
    assert points == pytest.approx(
        {40: found[1]["eval_accuracy_keep_0.4"], 100: found[1]["eval_accuracy_keep_1.0"]}
    )
    scalars = EventAccumulator(str(curve.parents[1]))
    scalars.Reload()
    logged = {event.step: event.value for event in scalars.Scalars("eval/loss_keep_1.0")}
    assert logged == pytest.approx({e["step"]: e["eval_loss_keep_1.0"] for e in found})


def test_a_dense_evaluation_counts_every_sample_once(train: Any, tiny_llava_folder: Path) -> None:
    batches = [
        evaluations(train(*EVAL[:2], f"trainer.per_device_eval_batch_size={size}", name=f"{size}"))
        for size in (1, 7)
    ]
    names = {"eval_loss", "eval_accuracy"}
    for one, all_at_once in zip(*batches, strict=True):
        assert {name for name in one if "loss" in name or "accuracy" in name} == names
        assert one["eval_loss"] == pytest.approx(all_at_once["eval_loss"], rel=1e-5)
        assert one["eval_accuracy"] == all_at_once["eval_accuracy"]


def test_accuracy_is_the_share_of_answers_that_match_exactly(tmp_path: Path) -> None:
    """Teacher forcing says of each sample what greedy generation does."""
    samples = write_dataset(tmp_path, train=0, val=24, seed=7, questions="base")["val"]
    loaded = load_pretrained(TINY, keep=0.5)
    assert loaded.attached is not None
    data = DataSection(train=(str(tmp_path / "val.json"),), workers=0)
    rows = build_dataset(data, data.train, Encoder(loaded.processor, 512))
    collate = Collator(loaded.processor.tokenizer.pad_token_id)
    answerer, images = Answerer(loaded), ImageFolder(tmp_path)
    evaluation = Evaluation(loaded.attached, (0.5, 0.15, 1.0))
    model = base_model(loaded.model)
    turns = [(n, t) for n, sample in enumerate(samples) for t in range(len(answers(sample)))]
    shares = []
    for keep in evaluation.targets:
        assert keep is not None
        loaded.attached.set_keep(keep)
        expected = [True] * len(samples)
        for i in range(0, len(turns), 10):  # each turn asked with the right ones before it
            asked = [until(samples[n], t) for n, t in turns[i : i + 10]]
            said = answerer([Question.from_record(record, images) for record in asked])
            for (n, t), answer in zip(turns[i : i + 10], said, strict=True):
                expected[n] &= answer.answer == answers(samples[n])[t]
        right = []
        for i in range(0, 24, 8):
            batch = collate([rows[j] for j in range(i, i + 8)])
            inputs = {k: v for k, v in batch.items() if k not in (BAD, PLACES)}
            with evaluation.at(keep, counted=False):
                right += evaluation.score(model, inputs)[:, 2].bool().tolist()
        assert right == expected, keep
        shares.append(sum(right))
    assert 0 < min(shares) < max(shares)


def test_scores_are_those_of_whole_logits(tiny_llava_folder: Path, tmp_path: Path) -> None:
    data = DataSection(train=(str(write_data(tmp_path, 4)),), workers=0)
    loaded = load_pretrained(tiny_llava_folder, keep=0.4)
    assert loaded.attached is not None
    rows = build_dataset(data, data.train, Encoder(loaded.processor, 2048))
    batch = Collator(0)([rows[i] for i in range(4)])
    inputs = {k: v for k, v in batch.items() if k not in (BAD, PLACES)}
    mask, targets = supervised(inputs["labels"])
    found = {}
    for keep in (0.4, 1.0):
        loaded.attached.set_keep(keep)
        with torch.no_grad():
            logits = loaded.model(**inputs).logits.log_softmax(-1)
        each = -logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
        evaluation = Evaluation(loaded.attached)
        with evaluation.at(keep, counted=False):
            found[keep] = evaluation.score(loaded.model, inputs)
        assert found[keep][:, 0].tolist() == pytest.approx(each.sum(1).tolist(), rel=1e-4)
        assert found[keep][:, 1].tolist() == mask.sum(1).tolist()
    loaded.attached.detach()
    dense = Evaluation(None).score(loaded.model, inputs)
    assert (dense - found[1.0]).abs().max() < 1e-4


def test_a_sample_that_supervises_nothing_is_not_right(
    tiny_llava_folder: Path, tmp_path: Path
) -> None:
    data = DataSection(train=(str(write_data(tmp_path, 2)),), workers=0)
    loaded = load_pretrained(tiny_llava_folder)
    rows = build_dataset(data, data.train, Encoder(loaded.processor, 2048))
    batch = Collator(0)([rows[i] for i in range(2)])
    inputs = {k: v for k, v in batch.items() if k not in (BAD, PLACES)}
    inputs["labels"][0] = -100
    found = Evaluation(loaded.attached).score(loaded.model, inputs)
    assert found[0].tolist() == [0, 0, 0]
    assert found[1, 1] > 0


# --------------------------------------------------------------------------------- contradictions
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune=null", "distill={every: 2}"), r"distill: a dense run has no budgets"),
        (("prune=null", "eval.keep=[0.4]"), r"eval.keep: a dense run has no budgets"),
        (("prune.keep=1.0", "distill={}"), r"distill: prune.keep is 1.0"),
        (("eval.keep=[0.4, 0.4]",), r"eval.keep: 0.4 stands there twice"),
        (("eval.keep=[0.4, 2]",), r"eval.keep: must be a fraction"),
        (
            ("eval.keep=[0.4]", "trainer.metric_for_best_model=eval_accuracy_keep_0.3"),
            r"metric_for_best_model: .* did you mean 'eval_accuracy_keep_0.4'",
        ),
        (("prune.keep=[0.4, 3]",), r"prune.keep\[1\]: must be a fraction"),
    ],
)
def test_contradictions_are_one_sentence(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    values = recipe_values(tmp_path, tmp_path, tmp_path) | {"prune": {"keep": 0.4}}
    path = write_recipe(tmp_path / "recipe.yaml", values)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)


def test_budgets_out_of_reach_are_refused_before_the_first_step(train: Any) -> None:
    evaluated = ("eval.keep=[0.9, 0.02]", "trainer.eval_strategy=steps")
    with pytest.raises(ValueError, match=r"eval.keep: 0.02 is out of reach of fastv"):
        train("prune.method=fastv", "prune.keep=0.9", *evaluated)
    with pytest.raises(ValueError, match=r"prune.keep: 0.02 is out of reach of fastv"):
        train("prune.method=fastv", "prune.keep=[0.9, 0.02]")


# ------------------------------------------------------------------------------------- end to end
@pytest.mark.slow
def test_one_checkpoint_answers_at_every_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list trained for a few steps on the bundled model, asked by the command."""
    samples = write_dataset(tmp_path / "data", train=160, val=24, seed=3, questions="base")["val"]
    samples = [sample for sample in samples if len(answers(sample)) == 1]
    (tmp_path / "data/val.json").write_text(json.dumps(samples))
    values = recipe_values(TINY, tmp_path / "data/train.json", tmp_path / "out")
    values["data"] |= {"val": str(tmp_path / "data/val.json"), "max_length": 512}
    values |= {"prune": {"keep": [0.22, 0.44, 1.0]}, "distill": {"every": 2}}
    values["eval"] = {"keep": [0.22, 1.0]}
    values["trainer"] |= {"max_steps": 12, "per_device_train_batch_size": 8,
                          "eval_strategy": "steps", "eval_steps": 12}  # fmt: skip
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values))
    run(recipe, ALONE)
    (found,) = evaluations(recipe.output)
    questions = tmp_path / "data/questions.jsonl"
    questions.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for keep, given in ((0.22, ()), (0.22, ("--keep", "0.22")), (1.0, ("--keep", "1.0"))):
        told = tmp_path / f"told-{len(given)}-{keep}.jsonl"
        asked = ["infer", "--model", str(recipe.output), "--jsonl", str(questions)]
        assert main([*asked, "--output", str(told), *given]) == 0
        lines = [json.loads(line) for line in told.open()]
        right = [[line["answer"]] == answers(s) for line, s in zip(lines, samples, strict=True)]
        assert sum(right) / len(right) == pytest.approx(found[f"eval_accuracy_keep_{keep}"])
        kept = [line["visual_layer_average"] for line in lines if line["visual_layer_average"]]
        assert sum(kept) / len(kept) == pytest.approx(keep, rel=0.15)


def test_parts_that_a_dense_step_leaves_out_get_a_gradient_of_zero(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else DDP would wait for them, and optimizers would treat them in different ways."""
    found: list[tuple[float, list[bool]]] = []

    def look(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        grads = [p.grad for p in self.method.parameters() if p.requires_grad]
        assert grads
        assert all(grad is not None for grad in grads)
        found.append((self.method.keep, [bool(grad.any()) for grad in grads]))
        return loss

    whole = PruneTrainer.training_step
    monkeypatch.setattr(PruneTrainer, "training_step", look)
    train("prune={method: quecc, keep: [0.25, 1.0]}", "trainer.max_steps=6")
    assert {keep for keep, _ in found} == {0.25, 1.0}
    for keep, moved in found:
        assert any(moved) == (keep == 0.25)
