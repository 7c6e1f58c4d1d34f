"""Recipes: strict names and types, overrides, places of errors, a resolved recipe that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from train.recipe.arguments import training_arguments
from train.recipe.config import load_recipe

BASE = """\
model:
  path: some/model
data:
  train: data.json
lora:
  r: 8
trainer:
  output_dir: out
  learning_rate: 1e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return path


def test_sections_become_typed_values(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.mode == "lora"
    assert loaded.lora is not None
    assert loaded.lora.r == 8
    assert loaded.data.train == ("data.json",)
    assert loaded.prune is None
    assert loaded.trainer["learning_rate"] == pytest.approx(1e-4)


def test_an_entry_of_a_list_is_where_the_list_is(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"^command line: prune.keep\[1\]: must be a fraction"):
        load_recipe(recipe, ["prune.keep=[0.2, 0]"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modle.path=x", r"unknown section 'modle'; did you mean 'model'\?"),
        ("lora.rank=3", r"lora: unknown option 'rank'"),
        ("data.max_lenght=3", r"did you mean 'max_length'\?"),
        ("trainer.learning_rat=1", r"did you mean 'learning_rate'\?"),
        ("prune.keep=1.5", r"prune.keep: must be a fraction in \(0, 1\], got 1.5"),
        ("prune.keep=0", r"prune.keep: must be a fraction"),
        ("prune.stage1.rule=chrod", r"did you mean 'chord'\?"),
        ("prune.method=itprun", r"did you mean 'itprune'\?"),
        ("prune.stage1.ruel=mean", r"did you mean 'rule'\?"),
        ("trainer.bf16=maybe", r"trainer.bf16: must be bool"),
        ("trainer.max_steps=many", r"trainer.max_steps: must be int"),
        ("model.mode=loar", r"did you mean 'lora'\?"),
        ("model.mode=full", r"model.mode: full does not use the `lora` section"),
        ("lora=null", None),
        ("data.max_bad=2", r"data.max_bad: must be a fraction"),
        ("trainer.resume_from_checkpoint=x", r"use --resume"),
        ("lora.r.x=1", r"lora.r is 8 and has no keys"),
        ("lora.r", r"not of the form section.key=value"),
        ("trainer.eval_strategy=steps", r"an evaluation needs data.val"),
        ("trainer=null", r"the section 'trainer' is missing"),
        ("trainer.output_dir=null", r"trainer.output_dir is missing"),
        ("data.train=[]", r"data.train: names no file"),
    ],
)
def test_a_wrong_override_is_one_sentence(
    recipe: Path, override: str, sentence: str | None
) -> None:
    if sentence is None:
        assert load_recipe(recipe, [override]).mode == "full"
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        load_recipe(recipe, [override])
    assert "\n" not in str(caught.value)


def test_an_error_names_file_and_line_or_the_command_line(recipe: Path) -> None:
    recipe.write_text(BASE.replace("  r: 8", "  alpha: 4\n  rr: 8"))
    with pytest.raises(ValueError, match=r"recipe.yaml:5: lora: unknown option 'rr'"):
        load_recipe(recipe)
    recipe.write_text(BASE.replace("  r: 8", "  alpha: 4\n  r: big"))
    with pytest.raises(ValueError, match=r"recipe.yaml:7: lora.r: must be int"):
        load_recipe(recipe)
    recipe.write_text(BASE)
    with pytest.raises(ValueError, match=r"^command line: lora.r: must be int"):
        load_recipe(recipe, ["lora.r=big"])


def test_a_broken_file_is_reported_with_its_line(recipe: Path) -> None:
    recipe.write_text("model:\n  path: [x\ndata: 1\n")
    with pytest.raises(ValueError, match=r"recipe.yaml:\d+: not valid YAML"):
        load_recipe(recipe)
    recipe.write_text(BASE + "model:\n  path: again\n")
    with pytest.raises(ValueError, match=r"recipe.yaml:10: model is already set at line 1"):
        load_recipe(recipe)
    with pytest.raises(ValueError, match="No such file"):
        load_recipe(recipe.with_name("other.yaml"))
    recipe.write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(recipe)


def test_overrides_reach_nested_options_and_keep_their_type(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "prune.stage1.rule=chord",
            "prune.keep={from: 1.0, to: 2.5e-1}",
            "trainer.learning_rate=2e-5",
            "trainer.eval_strategy=no",
            "data.train=[a.json, b.json]",
        ],
    )
    assert loaded.prune is not None
    assert loaded.prune.to_dict()["stage1"] == {"rule": "chord"}
    assert loaded.prune.final_keep == pytest.approx(0.25)
    assert loaded.trainer["learning_rate"] == pytest.approx(2e-5)
    assert loaded.trainer["eval_strategy"] == "no"
    assert loaded.data.train == ("a.json", "b.json")


def test_the_resolved_recipe_loads_to_the_same_recipe(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["prune.keep=0.3", "prune.stage2=null"])
    again = tmp_path / "again.yaml"
    again.write_text(loaded.to_yaml())
    assert load_recipe(again) == loaded
    assert yaml.safe_load(again.read_text())["prune"]["stage2"] is None


def test_training_arguments_get_our_defaults_and_refuse_in_one_sentence(tmp_path: Path) -> None:
    args = training_arguments(
        {"output_dir": str(tmp_path), "gradient_checkpointing": True, "use_cpu": True}, workers=3
    )
    assert args.remove_unused_columns is False
    assert args.label_names == ["labels"]
    assert args.dataloader_num_workers == 3
    assert args.gradient_checkpointing is True
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(ValueError, match=r"^trainer: .*sometimes"):
        training_arguments({"output_dir": str(tmp_path), "save_strategy": "sometimes"}, 0)
