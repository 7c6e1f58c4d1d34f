"""attach(model, config): switch token pruning on for a stock transformers model, and off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from types import MethodType, TracebackType

from torch import nn
from transformers import PreTrainedModel

from itprune.calibration import Calibration
from itprune.config import PruneConfig
from itprune.engine import Engine
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

    @property
    def packs(self) -> bool:
        """Whether rows that lose tokens are packed: asked for, and exact with this decoder."""
        return self.config.layout == "packed" and self._engine._plain

    @property
    def packs_text(self) -> bool:
        """Whether batches of text alone learn as pruned ones do: without their padding, with
        logits at supervised positions only. False unless set: they are the host's own forward."""
        return self._engine.packs_text

    @packs_text.setter
    def packs_text(self, packs: bool) -> None:
        self._engine.packs_text = packs

    @property
    def enters(self) -> float:
        """Share of the visual tokens that enters the LLM on average, at the target in force; 1.0
        where only the samples decide."""
        if self.method.idle:
            return 1.0
        shares = self.method.shares()
        return shares[0] if shares else 1.0

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

    @contextmanager
    def aside(self, keep: float | None, counted: bool = False) -> Iterator[None]:
        """For forwards beside a training: at another target, in evaluation mode, with logits at
        supervised positions only where labels are given; nothing is left of them in `keep`,
        `report` and `totals`.

        Args:
            keep: a fraction in (0, 1], or None.
            counted: `totals` count them all the same.

        Raises:
            ValueError: outside that range.
        """
        engine, before = self._engine, self.keep
        modes = {m: m.training for m in engine.family.model.modules()}
        report, totals = engine.report, engine.totals
        self.set_keep(keep)
        engine.totals = totals if counted else Totals()
        engine.label_only = True
        engine.family.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            engine.label_only = False
            engine.totals, engine.report = totals, report
            self.method.share(before)

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
