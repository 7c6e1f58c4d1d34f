"""The model card: metadata the hub accepts, the distribution of what is kept, the evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from itprune import Calibration, PromptFormat, PruneConfig
from itprune.card import KeptShares, evaluation_table, is_ours, write_card
from itprune.checkpoint import PrunerRecord

HISTORY = [
    {"loss": 2.0, "step": 1},
    {"eval_loss": 1.5, "eval_runtime": 3.0, "epoch": 0.5, "step": 2},
    {"eval_accuracy_keep_0.22": 0.25, "epoch": 0.5, "step": 2},
    {"eval_loss": 1.25, "eval_samples_per_second": 9.0, "epoch": 1.0, "step": 4},
]


def write(folder: Path, **values: object) -> str:
    write_card(folder, **values)
    return (folder / "README.md").read_text()


def metadata(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_shares_are_summarised() -> None:
    found = KeptShares.of([i / 100 for i in range(101)], "evaluation")
    assert found == KeptShares("evaluation", 101, 0.5, pytest.approx((0.1, 0.5, 0.9)))
    assert KeptShares.of([0.25], "training").quantiles == (0.25, 0.25, 0.25)
    assert KeptShares.of([], "training") is None


def test_entries_of_one_evaluation_are_one_row() -> None:
    assert evaluation_table(HISTORY).splitlines() == [
        "| step | epoch | eval_loss | eval_accuracy_keep_0.22 |",
        "| --- | --- | --- | --- |",
        "| 2 | 0.5 | 1.5 | 0.25 |",
        "| 4 | 1 | 1.25 |  |",
    ]
    assert evaluation_table(HISTORY[:1]) == ""


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("/data/llava", False),
        ("../llava", False),
        ("a/b/c", False),
        ("here", False),
    ],
)
def test_only_a_name_of_the_hub_is_metadata(
    base: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub refuses a card whose base model is a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    card = write(tmp_path / "out", base=base)
    assert (metadata(card).get("base_model") == base) is told
    assert metadata(card)["tags"] == ["itprune", "token-pruning"]
    assert "/data" not in card


@pytest.mark.parametrize("adapter", [True, False])
def test_a_pruned_folder_is_described(adapter: bool, tmp_path: Path) -> None:
    config = PruneConfig("visionzip+pyramiddrop", keep=[0.25, 1.0])
    recipe = {"model": {"path": "org/base"}, "prune": config.to_dict()}
    PrunerRecord(config, PromptFormat(), Calibration(samples=7), recipe).write(tmp_path)
    if adapter:
        name = {"base_model_name_or_path": "org/base"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(name))
    card = write(
        tmp_path, name="mine", history=HISTORY, kept=KeptShares.of([0.2, 0.3], "evaluation")
    )
    assert metadata(card)["library_name"] == ("peft" if adapter else "transformers")
    assert metadata(card)["base_model"] == "org/base"
    for said in (
        "# mine",
        "| method | `visionzip+pyramiddrop` |",
        " | 0.25 |",
        "| `keep` in training | `[0.25, 1.0]` |",
        "of 2 samples (evaluation)",
        "| 0.250 | 0.210 | 0.250 | 0.290 |",
        "Calibrated on 7 samples",
        "| eval_loss |",
        '"path": "org/base"',
        "itprune merge" if adapter else "AutoModelForImageTextToText.from_pretrained",
    ):
        assert said in card, said
    assert ("lost then" in card) is False
    (tmp_path / "pruner.safetensors").touch()
    assert "lost then" in write(tmp_path)


def test_a_dense_folder_says_so_and_other_cards_are_known(tmp_path: Path) -> None:
    assert is_ours(tmp_path)
    assert "without token pruning" in write(tmp_path, base="org/base")
    assert is_ours(tmp_path)
    (tmp_path / "README.md").write_text("# Somebody's card")
    assert not is_ours(tmp_path)
