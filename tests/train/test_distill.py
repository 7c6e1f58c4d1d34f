"""Self-distillation: the divergence of two forwards, weighed as the loss; no other trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import PruneConfig, attach
from tests.models import batch, tiny_llava
from tests.train.helpers import history, losses, recipe_values, write_data, write_recipe
from train.distill import Distiller
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.recipe.sections import DistillSection
from train.run import run
from train.supervised import rows_of, supervised

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
COUNTED = ("tokens_in", "kept_stage1", "kept_stage2", "layer_average", "keep")


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs the small recipe at keep 0.3 with some overrides; returns the output folder."""
    data = write_data(tmp_path / "data")

    def start(*overrides: str, name: str = "out") -> Path:
        values = recipe_values(tiny_llava_folder, data, tmp_path / name)
        path = write_recipe(tmp_path / "recipe.yaml", values | {"prune": {"keep": 0.3}})
        recipe = load_recipe(path, overrides)
        run(recipe, ALONE)
        return recipe.output

    return start


def test_the_divergence_is_that_of_two_separate_forwards() -> None:
    model, inputs = tiny_llava(), batch()
    mask, _ = supervised(inputs["labels"])
    whole = model(**inputs).logits[mask].double()  # the bare model
    with attach(model, PruneConfig(keep=0.3)) as attached:
        pruned = model(**inputs).logits[mask].double()
        expected = 0.0
        for full, short in zip((whole / 2).softmax(-1), (pruned / 2).softmax(-1), strict=True):
            expected += 4 * float((full * (full / short).log()).sum())
        model.train()
        teacher = Distiller(attached, DistillSection(every=3, temperature=2.0))
        report, totals = attached.report, attached.totals.samples
        answer = teacher.answer(model, inputs)
        assert attached.keep == 0.3
        assert attached.report is report
        assert attached.totals.samples == totals
        assert model.training
        assert answer.shape == (int(mask.sum()), model.config.text_config.vocab_size)
        assert not answer.requires_grad
        assert (answer - whole).abs().max() < 1e-5
        outputs = model(**inputs)
        assert outputs.logits.shape == answer.shape  # label-only in both
        found = teacher.divergence(rows_of(outputs.logits, mask), answer)
        assert float(found) == pytest.approx(expected, rel=1e-3)
        assert [teacher.teaches(step) for step in range(6)] == [False, False, True] * 2
        attached.set_keep(1.0)
        assert not teacher.teaches(2)


def test_lessons_are_part_of_the_loss_and_of_nothing_else(train: Any) -> None:
    plain = train(name="plain")
    steps = history(train("distill={every: 2, weight: 3.0}", name="taught"))
    before = history(plain)
    assert [("distill" in step) for step in steps] == [False, True, False, True]
    assert steps[0]["loss"] == before[0]["loss"]
    assert steps[1]["loss"] - before[1]["loss"] == pytest.approx(3 * steps[1]["distill"], rel=2e-3)
    for name in COUNTED:
        assert [step[name] for step in steps] == [step[name] for step in before]


@pytest.mark.parametrize(
    "more",
    [(), ("trainer.gradient_checkpointing=true",), ("trainer.bf16=true",)],
    ids=["plain", "checkpointing", "bf16"],
)
def test_a_weightless_lesson_changes_nothing(train: Any, more: tuple[str, ...]) -> None:
    """Dropout, recomputed layers and cached casts are those of a run without a teacher."""
    more = (*more, "lora.dropout=0.2")
    taught = train(*more, "distill={every: 1, weight: 1e-12}", name="taught")
    assert losses(taught) == losses(train(*more, name="plain"))


def test_a_step_may_be_split_at_will(train: Any) -> None:
    options = ("distill={every: 1, temperature: 2.0}", "trainer.max_grad_norm=0.1")
    once = train(*options, name="once")
    parts = train(
        *options,
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=4",
        name="parts",
    )
    assert losses(parts) == pytest.approx(losses(once), abs=1e-4)
    told = [[step["distill"] for step in history(output)] for output in (once, parts)]
    assert told[1] == pytest.approx(told[0], abs=1e-4)


def test_lessons_make_the_answers_agree() -> None:
    """The teacher is the model itself: only the pruned answers may move towards the whole ones."""
    torch.manual_seed(0)
    model, inputs = tiny_llava().train(), batch()
    mask, _ = supervised(inputs["labels"])
    with attach(model, PruneConfig(keep=0.2)) as attached:
        teacher = Distiller(attached, DistillSection(every=1))
        optimizer = torch.optim.Adam(model.model.language_model.parameters(), lr=1e-3)
        found = []
        for _ in range(12):
            answer = teacher.answer(model, inputs)
            divergence = teacher.divergence(rows_of(model(**inputs).logits, mask), answer)
            found.append(float(divergence))
            optimizer.zero_grad()
            divergence.backward()
            optimizer.step()
    assert found[-1] < 0.5 * found[0]
