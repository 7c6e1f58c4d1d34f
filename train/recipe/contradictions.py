"""Recipes that contradict themselves, refused before anything is read or loaded.

Each rule looks at one subject of the whole recipe and raises one sentence that starts with the key
it speaks of, so that file and line can be put before it. What only a machine or a launcher can tell
is checked when a run starts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from itprune.methods.combined import SEPARATOR
from itprune.options import nearest
from train.recipe.sections import ADAPTED, PARTS, metrics

if TYPE_CHECKING:
    from train.recipe.config import Recipe

ROUTED = "dyvte"
"""The method whose routers mode `router` trains."""
BITS = ("bnb", "8bit", "paged")
"""In the names of optimizers that bitsandbytes has."""


def check(recipe: Recipe) -> None:
    """Raises ValueError for the first contradiction."""
    rules = (adapters, quantised, frozen, rates, router, batches, evaluation, budgets, trainer)
    for rule in rules:
        rule(recipe)


def need(package: str, key: str, what: str, extra: str) -> None:
    """Raises ValueError when a package is not installed.

    Args:
        package: its name.
        key: the option that needs it.
        what: what of that option needs it.
        extra: of this project, which brings the package.
    """
    if find_spec(package) is None:
        raise ValueError(
            f"{key}: {what} needs {package}, which is not installed; pip install 'itprune[{extra}]'"
        )


def adapters(recipe: Recipe) -> None:
    """The `lora` section and the modes that use it."""
    if recipe.mode in ADAPTED and recipe.lora is None:
        raise ValueError(f"model.mode: {recipe.mode} needs a `lora` section (r, alpha, ...)")
    if recipe.mode not in ADAPTED and recipe.lora is not None:
        raise ValueError(f"model.mode: {recipe.mode} does not use the `lora` section; remove one")


def quantised(recipe: Recipe) -> None:
    """Four bits hold frozen weights only, and their types go together."""
    if recipe.mode != "qlora":
        if recipe.quant is not None:
            raise ValueError(
                f"quant: weights in 4 bits cannot train, and model.mode is {recipe.mode}; set "
                "model.mode: qlora (adapters on them), or remove the section"
            )
        return
    if recipe.model.dtype != "auto":
        raise ValueError(
            "model.dtype: mode qlora chooses the types itself (4 bits, and beside them bfloat16 "
            "with trainer.bf16, float32 without); remove it"
        )
    need("bitsandbytes", "model.mode", "qlora", "quant")


def frozen(recipe: Recipe) -> None:
    """Only mode full has parts to choose from; a method's own train beside every mode."""
    if recipe.mode == "full":
        return
    for part in recipe.model.freeze:
        if part != "pruner":
            raise ValueError(
                f"model.freeze: mode {recipe.mode} says itself which parts of the model train; "
                f"remove {part!r} (only `pruner` can be frozen here), or use mode full"
            )


def rates(recipe: Recipe) -> None:
    """Parts that certainly do not train need no rate; the model itself is asked later."""
    trains = may_train(recipe)
    for part in PARTS:
        if getattr(recipe.model.learning_rates, part) is not None and part not in trains:
            raise ValueError(
                f"model.learning_rates.{part}: nothing of this part trains in this recipe (mode "
                f"{recipe.mode}); remove the rate"
            )


def may_train(recipe: Recipe) -> set[str]:
    """The parts that may train, as far as the recipe alone tells."""
    parts = {
        "full": {"vision", "projector", "language"},
        "projector": {"projector"},
        "router": set(),
    }.get(recipe.mode, {"language"})
    if recipe.lora is not None and recipe.lora.train_projector:
        parts = parts | {"projector"}
    if recipe.lora is not None and recipe.lora.modules_to_save:
        parts = set(PARTS)
    if recipe.prune is not None:
        parts = parts | {"pruner"}
    return parts - set(recipe.model.freeze)


def router(recipe: Recipe) -> None:
    """Mode router and the method whose routers it trains."""
    if recipe.mode != "router":
        return
    if recipe.prune is None or ROUTED not in recipe.prune.method.split(SEPARATOR):
        raise ValueError(f"model.mode: router trains the routers of prune.method: {ROUTED}")
    options = recipe.prune.options
    if options.get("exit_layer", options.get(ROUTED, {}).get("exit_layer")) is not None:
        raise ValueError("prune.exit_layer: a fixed exit has no routers to train; remove it")
    if len(set(recipe.prune.budgets)) > 1:
        raise ValueError(
            "prune.keep: mode router forces exits, whatever the budget; give one number, which is "
            "met by calibration after training, or null"
        )
    if "pruner" in recipe.model.freeze:
        raise ValueError("model.freeze: mode router trains the pruner, it cannot be frozen")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if recipe.trainer.get(name):
            raise ValueError(
                f"trainer.{name}: mode router sends nothing back through the model, so there is "
                "nothing to recompute; remove it"
            )


def batches(recipe: Recipe) -> None:
    """Who says how large a batch is and in what order samples come; a stream has no length."""
    options, planned = recipe.trainer, recipe.data.max_tokens_per_batch is not None
    order = options.get("train_sampling_strategy", "random")
    if order in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"trainer.train_sampling_strategy: {order} would decode every sample before the first "
            "step; set data.max_tokens_per_batch, which groups by estimated lengths"
        )
    if order != "random" and (planned or recipe.data.streaming):
        raise ValueError(
            f"trainer.train_sampling_strategy: {order} has no effect beside data.streaming or "
            "data.max_tokens_per_batch, which have an order of their own; remove it"
        )
    if options.get("auto_find_batch_size") and planned:
        raise ValueError(
            "trainer.auto_find_batch_size: data.max_tokens_per_batch says how large a batch is; "
            "remove one of them"
        )
    if recipe.data.streaming and recipe.trainer.get("max_steps", -1) <= 0:
        raise ValueError(
            "data.streaming: a stream has no epochs that could end the run; set trainer.max_steps"
        )


def evaluation(recipe: Recipe) -> None:
    """An evaluation needs samples."""
    if recipe.trainer.get("eval_strategy", "no") != "no" and not recipe.data.val:
        raise ValueError("trainer.eval_strategy: an evaluation needs data.val")


def budgets(recipe: Recipe) -> None:
    """Distillation and evaluation at several budgets need a pruner whose budget counts."""
    for key, given in (("distill", recipe.distill is not None), ("eval.keep", recipe.eval_keep)):
        if given and recipe.prune is None:
            raise ValueError(
                f"{key}: a dense run has no budgets; add a `prune` section or remove it"
            )
        if given and recipe.mode == "router":
            raise ValueError(f"{key}: mode router forces exits, whatever the budget; remove it")
    if recipe.distill is not None and recipe.prune is not None:
        if set(recipe.prune.budgets) == {1.0}:
            raise ValueError("distill: prune.keep is 1.0, so there is nothing to learn; remove one")
        liger = recipe.trainer.get("liger_kernel_config") or {}
        if recipe.trainer.get("use_liger_kernel") and liger.get("fused_linear_cross_entropy"):
            raise ValueError(
                "distill: Liger's fused loss makes no logits to compare; remove "
                "fused_linear_cross_entropy from trainer.liger_kernel_config"
            )
    wanted = recipe.trainer.get("metric_for_best_model")
    known = ["loss"] if recipe.mode == "router" else metrics(recipe.eval_keep)
    if wanted is not None and str(wanted).removeprefix("eval_") not in known:
        names = nearest(str(wanted), [f"eval_{name}" for name in known])
        raise ValueError(f"trainer.metric_for_best_model: no evaluation has {wanted!r}; {names}")
    if recipe.eval_keep and recipe.trainer.get("eval_strategy", "no") == "no":
        raise ValueError(
            "eval.keep: no evaluation runs in which these could be measured; set "
            "trainer.eval_strategy and data.val"
        )


def trainer(recipe: Recipe) -> None:
    """Options of transformers that exclude each other or need a package."""
    options = recipe.trainer
    zero, fsdp = options.get("deepspeed"), options.get("fsdp")
    if options.get("fp16") and options.get("bf16"):
        raise ValueError("trainer.fp16: a run has one precision; remove this or trainer.bf16")
    if options.get("fp16") and options.get("use_cpu"):
        raise ValueError("trainer.fp16: half precision needs a GPU; use bf16, which a CPU can, too")
    if zero and fsdp:
        raise ValueError("trainer.fsdp: runs without trainer.deepspeed; remove one of them")
    if zero and options.get("torch_compile"):
        raise ValueError(
            "trainer.torch_compile: DeepSpeed's hooks and a compiled model do not go together; "
            "remove this or trainer.deepspeed"
        )
    optimizer = options.get("optim", "")
    if any(word in optimizer for word in BITS):
        need("bitsandbytes", "trainer.optim", optimizer, "quant")
