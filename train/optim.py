"""Learning rates by part: a projector learns at another rate than adapters, a tower at a lower one.

transformers divides the weights into two groups, those that decay and those that do not. Where
`model.learning_rates` names a rate, each part of the model gets two such groups of its own; which
weights decay stays transformers' rule, and so does everything about the optimizer. The schedule
moves all groups alike.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from train.model import base_of, parts_of
from train.recipe.sections import PARTS, Rates

OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""What transformers hands to optimizers that choose their weights themselves."""

NONE = Rates()


class RatesTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose parts may learn at rates of their own.

    Args:
        rates: of the parts that shall not have `learning_rate`.

    Raises:
        ValueError: the optimizer in use takes all weights alike.
    """

    def __init__(self, *args: Any, rates: Rates = NONE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = rates
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and named_rates(rates):
            check_deepspeed(plugin.deepspeed_config)
        self._in_force = RatesInForce()
        self.add_callback(self._in_force)

    def create_optimizer(self, model: Any = None) -> Any:
        try:
            if named_rates(self.rates) and self.optimizer is None:
                self._group(self.model if model is None else model)
            return super().create_optimizer(model)
        except ImportError as error:
            raise ValueError(f"trainer.optim: {' '.join(str(error).split())}") from None

    def _group(self, model: Any) -> None:
        """Hands transformers the optimizer of its choice with the groups of ours."""
        args = self.args
        kind, options = self.get_optimizer_cls_and_kwargs(args, model)
        check_optimizer(kind, options, OptimizerNames(args.optim).value)
        decaying = self.get_decay_parameter_names(model)
        groups = part_groups(model, decaying, args.weight_decay, args.learning_rate, self.rates)
        self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            logs |= self._in_force.rates
        super().log(logs, *args, **kwargs)


class RatesInForce(TrainerCallback):  # type: ignore[misc]
    """`learning_rate/PART` of the last step; nothing where all parts have one rate."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # When a step is logged, the schedule has moved on already.
        groups = kwargs["optimizer"].param_groups
        self.rates = {f"learning_rate/{g['part']}": float(g["lr"]) for g in groups if "part" in g}


def named_rates(rates: Rates) -> dict[str, float]:
    """The parts that a recipe gives a rate, with it."""
    found = {part: getattr(rates, part) for part in PARTS}
    return {part: rate for part, rate in found.items() if rate is not None}


def check_rates(model: Any, rates: Rates) -> None:
    """Raises ValueError when a rate is named for a part of which nothing trains."""
    owner = _owners(model)
    trained = {owner[id(p)] for p in model.parameters() if p.requires_grad}
    for part in named_rates(rates):
        if part not in trained:
            raise ValueError(
                f"model.learning_rates.{part}: nothing of this part trains here, only "
                f"{' and '.join(sorted(trained))}; remove the rate"
            )


def part_groups(
    model: Any, decaying: Collection[str], weight_decay: float, rate: float, rates: Rates
) -> list[dict[str, Any]]:
    """Groups for an optimizer, at most two for each part, those of the usual rate first.

    Args:
        model: what trains, PEFT-wrapped or not.
        decaying: names of the parameters that decay.
        weight_decay: of these.
        rate: of the parts that have none of their own.
        rates: those of the others.
    """
    owner, named, decays = _owners(model), named_rates(rates), frozenset(decaying)
    groups: dict[tuple[str, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (owner[id(parameter)], name in decays)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[part, decay],
            "weight_decay": weight_decay if decay else 0.0,
            "lr": named.get(part, rate),
            "part": part,
        }
        for part, decay in sorted(groups, key=lambda key: (key[0] in named, PARTS.index(key[0])))
    ]


def check_optimizer(kind: Any, options: Collection[str], name: str) -> None:
    """Raises ValueError for an optimizer that does not take groups.

    Args:
        kind: its class.
        options: names of its keywords.
        name: of `trainer.optim`.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or OWN_GROUPS & set(options):
        raise ValueError(
            f"trainer.optim: {name} divides the weights itself, so model.learning_rates has no "
            "effect on it; use another, such as adamw_torch, or remove the rates"
        )


def check_deepspeed(config: dict[str, Any]) -> None:
    """Raises ValueError for a DeepSpeed configuration whose optimizer takes all weights alike."""
    if "optimizer" in config:
        raise ValueError(
            "model.learning_rates: the DeepSpeed file names an optimizer, which gives all weights "
            "one rate; remove its `optimizer` and choose with trainer.optim"
        )


def _owners(model: Any) -> dict[int, str]:
    """The part of every parameter, by its identity: wrappers change names."""
    base = base_of(model)
    parts = parts_of(base)
    return {id(parameter): parts[name] for name, parameter in base.named_parameters()}
