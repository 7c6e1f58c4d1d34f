"""Batches of so many kept tokens: the feed alone, and whole runs on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from itprune import PruneConfig, attach
from tests.tiny_llava import build_processor
from tests.train.helpers import history, losses, recipe_values, write_data, write_recipe
from train.data.batches import WINDOW, Budget, Ranks, TokenBatches
from train.data.collate import PLACES, Collator
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.data.feed import Counts, read_state
from train.launcher import read_launch
from train.pruning import entering_share
from train.recipe.config import load_recipe
from train.recipe.sections import DataSection
from train.run import run

LIMIT = 150
Start = Callable[..., Path]


# ------------------------------------------------------------------------------------ the feed
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 48, text_every=3)


def feed(
    data: Path, ranks: Ranks | None = None, workers: int = 0, keep: float = 0.5, limit: int = LIMIT
) -> TokenBatches:
    processor = build_processor()
    samples = build_dataset(DataSection((str(data),)), (str(data),), Encoder(processor, 500))
    return TokenBatches(
        samples,
        Collator(0),
        (processor.image_token_id,),
        Budget(limit, packed=True, keep=lambda step, total: keep, steps=1000),
        ranks or Ranks(),
        seed=0,
        loading={"num_workers": workers, "prefetch_factor": None},
    )


def drive(
    made: TokenBatches, start: int, stop: int, accumulation: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """The batches of steps `start` … `stop` - 1, as a trainer would fetch them; a quarter of the
    visual tokens is kept, half of what is aimed at."""
    seen = 0
    batches = iter(made.batches(start * accumulation))
    for step in range(start, stop):
        found = list(islice(batches, accumulation))
        seen += sum(int((batch["input_ids"] == 3).sum()) for batch in found)
        made.step(step + 1, lambda now=seen: (4 * now, now))
        yield found


def places(steps: Iterator[list[dict[str, Any]]]) -> list[list[list[str]]]:
    return [[batch[PLACES] for batch in step] for step in steps]


def test_batches_are_as_large_as_the_limit_allows(data: Path) -> None:
    sizes = []
    for step in drive(feed(data), 0, 20):
        ids, mask = step[0]["input_ids"], step[0]["attention_mask"]
        visual = int((ids == 3).sum())
        sizes.append(int(mask.sum()) - visual + visual * 0.5)
    assert max(sizes) <= LIMIT
    assert sum(sizes) / len(sizes) > 0.75 * LIMIT


def test_ranks_share_a_step_out_among_them(data: Path) -> None:
    alone = places(drive(feed(data, Ranks(0, 1, accumulation=4)), 0, 6, accumulation=4))
    shared = [
        places(drive(feed(data, Ranks(rank, 2, accumulation=2)), 0, 6, accumulation=2))
        for rank in range(2)
    ]
    for whole, first, second in zip(alone, *shared, strict=True):
        assert whole == [first[0], second[0], first[1], second[1]]


def test_what_is_kept_refines_the_plan_two_windows_later(data: Path) -> None:
    counts = [len(step[0][PLACES]) for step in drive(feed(data), 0, 3 * WINDOW)]
    before, after = counts[: 2 * WINDOW], counts[2 * WINDOW :]
    assert sum(after) / len(after) > 1.05 * sum(before) / len(before)


def test_a_resumed_feed_goes_on_with_the_very_same_batches(data: Path) -> None:
    ranks, end = Ranks(0, 1, accumulation=2), 3 * WINDOW + 5
    whole = feed(data, ranks)
    expected = places(drive(whole, 0, end, 2))
    for stop in (WINDOW - 7, 2 * WINDOW, 2 * WINDOW + 9):
        broken = feed(data, ranks, workers=2)
        steps = drive(broken, 0, stop, 2)
        seen = sum(int((batch["input_ids"] == 3).sum()) for step in steps for batch in step)
        state = json.loads(json.dumps(broken.state_dict(lambda now=seen: (4 * now, now))))
        later = feed(data, ranks, workers=1)
        later.load_state_dict(state)
        assert places(drive(later, stop, end, 2)) == expected[stop:]
        assert later.epoch(end) == whole.epoch(end)


def test_more_workers_than_a_window_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match=r"data.workers: 33 is more than"):
        feed(data, workers=WINDOW + 1)
    assert feed(data, workers=20).loading["prefetch_factor"] == 1


def test_a_state_that_is_missing_or_damaged_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_state.json: missing or damaged"):
        read_state(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        feed(data).load_state_dict({"step": 3, "drawn": 9, "waiting": [], "first": [1, 2]})


# ------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def train(tiny_llava_folder: Path, data: Path, tmp_path: Path) -> Start:
    def start(*overrides: str, name: str = "out", source: Path = data) -> Path:
        values = recipe_values(tiny_llava_folder, source, tmp_path / name)
        values["data"]["max_tokens_per_batch"] = LIMIT
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, read_launch(None, {}))
        return recipe.output

    return start


def test_a_resumed_run_has_the_same_curve_and_samples(train: Start) -> None:
    options = (
        "prune.keep=[0.4, 0.2, 1.0]", "lora.dropout=0.1", "trainer.max_steps=70",
        "trainer.save_strategy=steps", "trainer.save_steps=35", "trainer.learning_rate=1e-4",
    )  # fmt: skip
    output = train(*options)
    expected = history(output)
    samples = {
        keep: fmean(step["samples"] for step in expected if step["keep"] == keep)
        for keep in (0.2, 0.4, 1.0)
    }
    assert samples[0.2] > samples[0.4] > samples[1.0]
    shutil.rmtree(output / "checkpoint-70")
    again = history(train(*options, "data.workers=1"))
    for key in ("loss", "samples", "tokens_in", "keep", "epoch"):
        assert [step[key] for step in again] == [step[key] for step in expected]


def test_epochs_become_a_forecast_of_steps(train: Start, capfd: pytest.CaptureFixture[str]) -> None:
    output = train("trainer.max_steps=-1", "trainer.num_train_epochs=2", "prune.keep=0.3")
    steps = len(history(output))
    assert f"about {steps} steps are 2 epoch(s)" in capfd.readouterr().out
    assert history(output)[-1]["epoch"] == pytest.approx(2, abs=0.3)


def test_bad_samples_are_replaced_and_counted(train: Start, tmp_path: Path) -> None:
    source = write_data(tmp_path / "broken", 24)
    (source.parent / "images/1.png").unlink()
    output = train("data.max_bad=0.2", "trainer.max_steps=8", source=source)
    assert history(output)[-1]["bad_samples"] == 1
    assert "missing image" in (output / "bad_samples.jsonl").read_text()


class Given:
    """A feed of batches made beforehand."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.given = batches

    def batches(self, done: int) -> Iterator[dict[str, Any]]:
        return ({**batch, "bad": []} for batch in self.given[done:])

    def step(self, steps: int, counts: Counts) -> None: ...

    def epoch(self, steps: int) -> None: ...

    def state_dict(self, counts: Counts) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("prune", [(), ("prune.keep=0.4",)], ids=["dense", "pruned"])
def test_uneven_batches_give_the_loss_and_gradient_of_one(
    train: Start, data: Path, monkeypatch: pytest.MonkeyPatch, prune: tuple[str, ...]
) -> None:
    """Eight samples a step as 1 + 5 + 2 and as one batch: the mean is over supervised tokens."""
    collate = Collator(0)
    rows = [feed(data).data[i] for i in range(32)]
    parts = [rows[i + a : i + b] for i in range(0, 32, 8) for a, b in ((0, 1), (1, 6), (6, 8))]
    curves = []
    for name, groups, accumulation in (
        ("parts", parts, 3),
        ("whole", [rows[i : i + 8] for i in range(0, 32, 8)], 1),
    ):
        given = Given([collate(group) for group in groups])
        monkeypatch.setattr("train.run.token_batches", lambda *args, given=given: given)
        accumulate = f"trainer.gradient_accumulation_steps={accumulation}"
        output = train(*prune, accumulate, "trainer.max_grad_norm=1.0", name=name)
        curves.append([(step["loss"], step["grad_norm"]) for step in history(output)])
    assert torch.allclose(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-4)


def test_lengths_count_at_the_largest_keep_of_the_run(
    tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    values = recipe_values(tiny_llava_folder, data, tmp_path / "run")
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values))

    def share(keep: Any) -> float:
        model = AutoModelForImageTextToText.from_pretrained(tiny_llava_folder)
        with attach(model, PruneConfig(keep=keep, options={"stage2": None})) as attached:
            before = attached.keep
            found = entering_share(recipe, attached)
            assert attached.keep == before
        return found

    assert entering_share(recipe, None) == 1.0
    assert share(0.25) == pytest.approx(0.25)
    assert share([0.25, 0.5]) == pytest.approx(0.5)
    assert share({"from": 1.0, "to": 0.25}) == 1.0


# --------------------------------------------------------------------------------- two processes
@pytest.mark.slow
@pytest.mark.xdist_group("launchers")
def test_two_processes_run_the_same_plan_and_go_on(
    train: Start, tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Past the first refinement, which both ranks' sums make."""
    from tests.test_launch import SCRIPT, call

    common = ("prune.keep=0.4", "trainer.max_steps=70", "trainer.learning_rate=1e-4")
    alone = train(*common, "trainer.gradient_accumulation_steps=2", name="alone")
    values = recipe_values(tiny_llava_folder, data, tmp_path / "two")
    values["data"]["max_tokens_per_batch"] = LIMIT
    recipe = str(write_recipe(tmp_path / "two.yaml", values))
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=60")
    start = ("-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml")
    for _ in range(2):
        done = call(*start, SCRIPT, recipe, *common, *saving)
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=1e-4)
        for key in ("samples", "tokens_in", "epoch"):
            counts = [[step[key] for step in history(out)] for out in (alone, tmp_path / "two")]
            assert counts[0] == counts[1]
        assert all(0 < step["layer_average"] <= 1 for step in history(tmp_path / "two"))
        shutil.rmtree(tmp_path / "two/checkpoint-70")
