"""A recipe: one YAML file, its sections each mapped to one known dataclass.

`model`, `data` and `trainer` are required; without `lora` there are no adapters, without `prune`
the model is dense. Unknown or misspelt names are refused with the nearest valid one and their
place, `section.key=value` overrides win over the file, and nothing in a recipe is ever evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from itprune.config import PruneConfig
from itprune.methods import build_method
from itprune.methods.base import Host
from itprune.options import from_mapping, nearest, to_plain
from train.recipe.arguments import check_trainer
from train.recipe.contradictions import check
from train.recipe.sections import (
    DataSection,
    DistillSection,
    EvalSection,
    LoraSection,
    ModelSection,
    QuantSection,
)
from train.recipe.yaml_source import Source, read_yaml

OPTIONAL = {
    "lora": LoraSection,
    "quant": QuantSection,
    "distill": DistillSection,
    "eval": EvalSection,
}
SECTIONS = ("model", "data", *OPTIONAL, "prune", "trainer")
REQUIRED = ("model", "data", "trainer")
VERY_DEEP = 1000
RECIPE_NAME = "recipe.yaml"


@dataclass(frozen=True)
class Recipe:
    """A validated run. `trainer` holds plain TrainingArguments, checked by name and type."""

    model: ModelSection
    data: DataSection
    trainer: dict[str, Any]
    lora: LoraSection | None = None
    quant: QuantSection | None = None
    distill: DistillSection | None = None
    eval: EvalSection | None = None
    prune: PruneConfig | None = None

    @property
    def mode(self) -> str:
        """What trains: lora, qlora, full, projector or router."""
        assert self.model.mode is not None
        return self.model.mode

    @property
    def eval_keep(self) -> tuple[float, ...]:
        """Budgets that evaluations name; none: the one in force."""
        return self.eval.keep if self.eval is not None else ()

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower trains, whose last layers may reach no loss."""
        return self.mode == "full" and "vision" not in self.model.freeze

    @property
    def output(self) -> Path:
        """The folder of checkpoints, logs and the trained model."""
        return Path(self.trainer["output_dir"]).expanduser()

    def to_dict(self) -> dict[str, Any]:
        """The resolved sections as plain values; `recipe_from` gives an equal recipe back."""
        sections = {
            "model": to_plain(self.model),
            "data": to_plain(self.data),
            **{name: to_plain(getattr(self, name)) for name in OPTIONAL},
            "prune": self.prune.to_dict() if self.prune is not None else None,
            "trainer": dict(self.trainer),
        }
        return {name: value for name, value in sections.items() if value is not None}

    def to_yaml(self) -> str:
        """The resolved recipe as a file that can be run again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe; needs neither the model nor the data.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts, applied in order.

    Raises:
        ValueError: what is wrong and where, in one sentence.
    """
    source = read_yaml(Path(path))
    for text in overrides:
        source.override(text)
    return recipe_from(source)


def recipe_from(source: Source) -> Recipe:
    """Validates the values of `source`; errors carry the place of the key they speak of."""
    values = {name: value for name, value in source.values.items() if value is not None}
    for name in values:
        if name not in SECTIONS:
            hint = nearest(str(name), SECTIONS)
            raise ValueError(f"{source.where(str(name))}: unknown section {name!r}; {hint}")
    for name in REQUIRED:
        if name not in values:
            raise ValueError(f"{source.path}: the section {name!r} is missing")
    for name, section in values.items():
        _check_keys(source, name, section)
    try:
        return _build(values)
    except ValueError as error:
        key = str(error).partition(":")[0]
        raise ValueError(f"{source.where(key)}: {error}") from None


def _build(values: dict[str, Any]) -> Recipe:
    data = dict(values["data"])
    for key in ("train", "val"):
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    for section, key in (("model", "path"), ("data", "train"), ("trainer", "output_dir")):
        if values[section].get(key) is None:
            raise ValueError(f"{section}: {section}.{key} is missing")
    model = from_mapping(ModelSection, values["model"], "model")
    mode = model.mode or ("lora" if "lora" in values else "full")
    freeze = model.freeze if mode == "full" or "freeze" in values["model"] else ()
    recipe = Recipe(
        model=dataclasses.replace(model, mode=mode, freeze=freeze),
        data=from_mapping(DataSection, data, "data"),
        trainer=check_trainer(values["trainer"]),
        **{n: from_mapping(c, values[n], n) for n, c in OPTIONAL.items() if n in values},
        prune=_prune(values["prune"]) if "prune" in values else None,
    )
    check(recipe)
    return recipe


def _prune(values: dict[str, Any]) -> PruneConfig:
    """The method's own options are checked here too; layers only against a very deep model."""
    config = PruneConfig.from_dict(values)
    host = dataclasses.replace(Host.example(), depth=VERY_DEEP)
    with torch.device("meta"):  # trained parts of such a model would not fit into memory
        build_method(config.method, config.options, host)
    return config


def _check_keys(source: Source, name: str, section: Any) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"{source.where(name)}: {name}: must be a mapping, got {section!r}")
    for key in section:
        if not isinstance(key, str):
            raise ValueError(f"{source.where(name)}: {name}: {key!r} is not an option's name")
