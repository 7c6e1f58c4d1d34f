"""attach(model, config): switch token pruning on for a stock transformers model, and off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from itprune.calibration import Calibration
from itprune.config import PruneConfig
from itprune.engine import Engine
from itprune.engine.request import PIXELS
from itprune.families import find_family
from itprune.families.base import Family, PatchFamily
from itprune.methods import build_method, method_class, methods
from itprune.methods.base import Method
from itprune.prompt import PromptFormat
from itprune.report import Report, Totals
from itprune.trace import Trace
from itprune.trained import register_trained, unregister_trained


class Attached:
    """A pruner at work inside a model. Also a context manager that detaches on exit."""

    def __init__(self, engine: Engine, config: PruneConfig, model: nn.Module) -> None:
        self._engine = engine
        self.config = config
        self.model = model
        """As the user holds it, PEFT-wrapped or not."""

    @property
    def method(self) -> Method:
        return self._engine.method

    @property
    def prompt(self) -> PromptFormat:
        return self._engine.prompt

    @property
    def report(self) -> Report | None:
        """What the last forward with images kept; None before the first pruned one."""
        return self._engine.report

    @property
    def totals(self) -> Totals:
        """Running sums since `totals.reset()`."""
        return self._engine.totals.collect()

    @property
    def calibration(self) -> Calibration | None:
        return self.method.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self.method.use(calibration)

    @property
    def keep(self) -> float | None:
        """The target in force; None: the method's own rule decides."""
        return self.method.keep

    def set_keep(self, keep: float | None) -> None:
        """Changes the target: a fraction in (0, 1], or None.

        Raises:
            ValueError: outside that range.
        """
        self.method.share(self.config.replace(keep=keep).final_keep)

    def set_step(self, step: int, total: int, seed: int = 0) -> None:
        """Sets the target that `keep` has in training step 0 … total - 1, or after training.

        Call it before each optimizer step when `keep` moves (a Schedule) or is drawn (a list).

        Args:
            step: optimizer steps done; from `total` on, what holds after training.
            total: optimizer steps of the whole training.
            seed: of the draw; all processes must give the same.
        """
        self.method.share(self.config.keep_at(step, total, seed))

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Records the choices of the forwards inside, the last one's in the end."""
        self._engine.trace = trace = Trace()
        try:
            yield trace
        finally:
            self._engine.trace = None

    def detach(self) -> None:
        """Gives the model back exactly as it was."""
        self._engine.detach()
        unregister_trained(self._engine.family.model, self.method)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, whether PEFT wraps it or not.

    Raises:
        ValueError: neither a transformers nor a PEFT model.
    """
    from peft import PeftModel  # slow to import, and needed only here

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"attach needs a transformers or PEFT model, got {type(model).__name__}")
    return inner


def attach(
    model: nn.Module,
    config: PruneConfig | None = None,
    *,
    prompt: PromptFormat | None = None,
    calibration: Calibration | None = None,
) -> Attached:
    """Puts a pruner inside a model's forward; everything else about the model stays.

    Args:
        model: a supported transformers model, PEFT-wrapped or not (wrap first, then attach).
        config: what to prune; the default keeps 22 %.
        prompt: the chat template's tokens (`PromptFormat.from_processor`); without it instruction
            text is told from answers by the labels and only special tokens are protected.
        calibration: what `calibrate` returned, so that `keep` is met on average.

    Raises:
        ValueError: unknown family, method or option; a layer beyond the depth; attached already.
    """
    config = config or PruneConfig()
    inner = base_model(model)
    _refuse_second(inner)
    family = find_family(inner)
    method = build_method(config.method, config.options, family.host)
    _refuse_misfit(inner.config.model_type, family, method, config)
    method.use(calibration)
    check_budgets(method, config.budgets)
    method.share(config.keep_at(0, 1) if model.training else config.final_keep)
    _refuse_savings(inner.config.model_type, family, method)
    prompt = prompt or PromptFormat(_special_ids(inner))
    method = register_trained(model, inner, method)
    try:
        return Attached(Engine(inner, family, method, config, prompt), config, model)
    except ValueError:
        unregister_trained(inner, method)
        raise


def check_budgets(method: Method, budgets: Iterable[float | None]) -> None:
    """Refuses targets out of a method's reach now, not in the middle of a training.

    Leaves one of them in force.

    Raises:
        ValueError: for the first that cannot be met.
    """
    for keep in sorted(budgets, key=lambda keep: keep or 0.0):  # 1.0 last: it fixes no sizes
        method.share(keep)
        if not method.idle:
            method.shares()


def _refuse_misfit(model_type: str, family: Family, method: Method, config: PruneConfig) -> None:
    if method.needs_patches and not isinstance(family, PatchFamily):
        fitting = (name for name in methods() if not method_class(name).needs_patches)
        raise ValueError(
            f"prune.method: {config.method} reads the vision encoder's patches one by one, but in "
            f"{model_type} a visual token is not one of them; choose one of: {', '.join(fitting)}"
        )
    if config.positions == "contiguous" and family.position_axes > 1:
        raise ValueError(
            "prune.positions: contiguous positions are defined for models with one position id a "
            f"token, and {model_type} has {family.position_axes}; set prune.positions: original"
        )


def _refuse_savings(model_type: str, family: Family, method: Method) -> None:
    """What a method may not spare in attention: where visual tokens stand must be known, and a
    kernel that only the host has must not be replaced."""
    if method.windowed:
        family.slot_grids(prod(family.usual_grid))
    own = family.eager is not None and family.text_model.config._attn_implementation == "eager"
    if own and method.attends:
        raise ValueError(
            f"prune.method: {model_type} runs an attention of its own here, which nothing can be "
            "spared of; set window, heads and cut to null, or choose another method"
        )


def _refuse_second(model: PreTrainedModel) -> None:
    owners = (h.__self__ for h in model._forward_pre_hooks.values() if isinstance(h, MethodType))
    if any(isinstance(owner, Engine) for owner in owners):
        raise ValueError("this model is attached already; detach() it first")


def _special_ids(model: PreTrainedModel) -> tuple[int, ...]:
    text = model.config.get_text_config()
    ids: set[int] = set()
    for value in (text.bos_token_id, text.eos_token_id, text.pad_token_id):
        ids.update([] if value is None else value if isinstance(value, list) else [value])
    return tuple(sorted(ids))


@torch.no_grad()
def calibrate(
    attached: Attached, batches: Iterable[Mapping[str, Any]], limit: int = 256
) -> Calibration:
    """Measures what the raw rule keeps, so that the `keep` in force is met on average.

    A method may go through the batches several times, e.g. once per stage.

    Args:
        attached: an attached model; its `calibration` is set.
        batches: collated model inputs; at most `limit` rows are read.
        limit: rows to use.

    Raises:
        ValueError: no batch had an image, or the method has nothing to calibrate.
    """
    if not attached.method.calibrates:
        raise ValueError(f"method {attached.config.method!r} has nothing to calibrate")
    rows = _first_rows(batches, limit)
    if not rows:
        raise ValueError("calibration needs samples with images, and found none")
    with _aside(attached):
        found = attached.method.calibrate(_Trial(attached, rows))
    samples = sum(_with_images(attached._engine.family, batch["input_ids"]) for batch in rows)
    found = dataclasses.replace(found, samples=samples, host=attached.method.host.to_dict())
    attached.calibration = found
    return found


def _with_images(family: Family, ids: Tensor) -> int:
    """How many of (B, S) rows have images or videos."""
    visual = torch.isin(ids, torch.tensor(family.visual_token_ids, device=ids.device))
    return int(visual.any(1).sum())


class _Trial:
    """What a method does with the calibration batches."""

    def __init__(self, attached: Attached, batches: list[Mapping[str, Any]]) -> None:
        self.attached, self.batches = attached, batches
        self.device = attached._engine.family.model.device
        self.dense: list[Tensor] = []

    def run(self) -> None:
        """Forwards every calibration batch."""
        for batch in self.batches:
            self._forward(batch)

    def fidelity(self) -> float:
        """exp(-KL(dense | now)) of the next-token distribution, averaged over all samples."""
        method = self.attached.method
        if not self.dense:
            keep = method.keep
            method.share(1.0)
            recorder, method.recorder = method.recorder, None
            self.dense = [self._forward(batch).log_softmax(-1) for batch in self.batches]
            method.share(keep)
            method.recorder = recorder
        total, count = 0.0, 0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            now = self._forward(batch).log_softmax(-1)
            divergence = (dense.exp() * (dense - now)).sum(-1)
            total += float(divergence.neg().exp().sum())
            count += len(divergence)
        return total / count

    def _forward(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, vocabulary) float32 logits of each prompt's last token."""
        device = self.device
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        place = torch.arange(mask.shape[1], device=device)
        last = (mask * (place + 1)).argmax(1)
        columns = last.unique()
        # By its outermost part: sharded weights (FSDP) are gathered from there.
        model = self.attached.model
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        return logits[torch.arange(len(last)), torch.searchsorted(columns, last)].float()


@contextmanager
def _aside(attached: Attached) -> Iterator[None]:
    """Evaluation mode, and nothing of what runs inside is left in reports or totals."""
    engine = attached._engine
    modes = {m: m.training for m in engine.family.model.modules()}
    report, totals = engine.report, engine.totals
    engine.totals = Totals()
    engine.family.model.eval()
    try:
        yield
    finally:
        engine.totals, engine.report = totals, report
        for module, mode in modes.items():
            module.training = mode


def _first_rows(batches: Iterable[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    rows, count = [], 0
    for batch in batches:
        if all(batch.get(name) is None for name in PIXELS):
            continue
        rows.append(batch)
        count += len(batch["input_ids"])
        if count >= limit:
            break
    return rows
