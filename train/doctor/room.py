"""How many batches and steps a run has, and what it takes on the disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from train.doctor.forecast import Kept, Survey
from train.doctor.memory import Load, Memory, Setup
from train.pruning import entering_share
from train.recipe.config import Recipe


@dataclass(frozen=True)
class Batches:
    """The batches of one process, at the largest budget."""

    samples: float
    """Of a batch, on average."""
    tokens: int
    """Kept tokens of a batch (layer average), on average."""
    largest: Load
    steps_per_epoch: int | None
    """None: a stream has no epochs."""
    steps: int


@dataclass(frozen=True)
class Disk:
    """Bytes in the output folder."""

    checkpoint: int
    """Of one checkpoint."""
    checkpoints: int
    """How many there will be at the most."""
    final: int
    """Of the trained model."""
    free: int

    @property
    def needed(self) -> int:
        return self.checkpoint * self.checkpoints + self.final


def batches_of(
    recipe: Recipe,
    args: Any,
    data: Survey,
    budgets: list[Kept],
    pruned: Any | None,
    processes: int,
) -> Batches:
    """The forecast of batches and steps at the largest budget.

    Args:
        recipe: the run.
        args: its TrainingArguments.
        data: the survey, with at least one good sample.
        budgets: the run's.
        pruned: the pruner, if there is one.
        processes: that train.
    """
    known = [kept.keep for kept in budgets if kept.keep is not None]
    keep = max(known) if pruned is not None and len(known) == len(budgets) else 1.0
    enters = entering_share(recipe, pruned)
    costs = sorted((size.tokens(keep) for size in data.sizes), reverse=True)
    mean = sum(costs) / len(costs)
    limit = recipe.data.max_tokens_per_batch
    samples = args.per_device_train_batch_size if limit is None else max(limit / mean, 1.0)
    most = min(max(round(samples), 1), len(costs))
    ordered = sorted(data.sizes, key=lambda size: size.tokens(keep), reverse=True)[:most]
    factor = samples / most  # the sample of the data may hold fewer than a batch
    packed = pruned is not None and pruned.packs and keep < 1.0
    tokens = sum(costs[:most]) * factor if packed else costs[0] * samples
    entering = [size.tokens(enters) for size in ordered]
    inside = sum(entering) * factor if packed else max(entering) * samples
    if limit is not None:  # long samples are never together above it
        inside *= min(1.0, max(limit, costs[0]) / tokens)
        tokens = min(tokens, max(limit, costs[0]))
    some = keep < 1.0 and recipe.prune is not None and recipe.prune.label_only_logits == "pruned"
    labels_only = some or (recipe.prune is not None and recipe.prune.label_only_logits == "always")
    supervised = sum(size.supervised for size in ordered) * factor
    load = Load(
        tokens_in=round(inside),
        tokens=round(tokens),
        logits=round(supervised if labels_only else inside),
        patches=round(sum(size.patches for size in ordered) * factor),
    )
    accumulation = args.gradient_accumulation_steps
    per_epoch = None
    if data.total:
        rounds = math.ceil(data.total * (1 - data.bad_share) / (samples * processes))
        per_epoch = max(math.ceil(rounds / accumulation), 1)
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * (per_epoch or 0))
    return Batches(samples, round(mean * samples), load, per_epoch, steps)


def disk_of(
    recipe: Recipe, args: Any, model: Any, memory: Memory, batches: Batches, setup: Setup
) -> Disk:
    """What checkpoints and the trained model take.

    Args:
        recipe: the run.
        args: its TrainingArguments.
        model: as it will train.
        memory: of one process.
        batches: the forecast of its steps.
        setup: how it is started.
    """
    adapters = recipe.lora is not None
    saved = sum(
        p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapters
    )
    shards = setup.processes if setup.zero else 1
    states = (memory.optimizer + memory.offloaded) * shards
    states += saved if setup.deepspeed else 0  # which keeps the weights in a file of its own, too
    strategy = str(args.save_strategy).rpartition(".")[2].lower()
    steps, epoch = batches.steps, batches.steps_per_epoch
    every = args.save_steps if strategy == "steps" else epoch or steps
    every = every if every >= 1 else max(round(every * steps), 1)
    count = 0 if strategy == "no" else max(math.ceil(steps / max(every, 1)), 1)
    if args.save_total_limit and args.save_total_limit > 0:
        count = min(count, args.save_total_limit + 1)  # the oldest goes after the newest is there
    there = recipe.output.resolve()
    folder = next(f for f in (there, *there.parents) if f.exists())
    return Disk(saved + states, count, saved, shutil.disk_usage(folder).free)


def device_memory(cpu: bool, processes: int) -> int:
    """Bytes one process has; 0: this machine does not tell."""
    if cpu:
        from itprune.environment import memory

        return memory() // processes
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return 0
