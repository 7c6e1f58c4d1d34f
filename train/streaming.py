"""Where a recipe meets a stream: opening it, and how its samples make batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.bad_samples import BadSamples, StreamedBadSamples
from train.data.collate import Collator
from train.data.dataset import SampleDataset
from train.data.encode import Encoder
from train.data.feed import read_state
from train.data.lengths import kept_tokens
from train.data.stream import StreamFeed, build_stream, fixed, within
from train.recipe.config import Recipe

REPORT = "bad_samples.jsonl"


def open_stream(recipe: Recipe, args: Any, encoder: Encoder, collator: Collator) -> StreamFeed:
    """The stream of `data.streaming`, with batches of `per_device_train_batch_size`.

    Args:
        recipe: the run.
        args: TrainingArguments.
        encoder: turns a sample into tensors.
        collator: makes batches.

    Raises:
        ValueError: anything wrong with the files.
    """
    return build_stream(
        recipe.data,
        encoder,
        collator,
        fixed(args.train_batch_size),
        rank=args.process_index,
        world=args.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        options={
            "num_workers": args.dataloader_num_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        },
    )


def ready_stream(
    stream: StreamFeed,
    limit: int | None,
    visual_ids: Sequence[int],
    attached: Any | None,
    checkpoint: Path | None,
) -> StreamFeed:
    """The stream with batches of `data.max_tokens_per_batch`, and where a checkpoint left it.

    A stream knows its samples' lengths, but not the step they will be trained at: kept tokens are
    counted at the largest `keep` of the run.

    Args:
        stream: as it was opened.
        limit: kept tokens of a batch; None: batches of a fixed number of samples.
        visual_ids: placeholders of visual tokens.
        attached: the pruner in force; None: every token is kept.
        checkpoint: where the run goes on from.
    """
    if limit is not None:
        budgets = attached.config.budgets if attached is not None else (1.0,)
        share = 1.0 if None in budgets else max(budgets)
        cost = partial(kept_tokens, visual_ids=torch.tensor(visual_ids), share=share)
        stream.group = within(limit, cost, packed=attached is not None and attached.packs)
    if checkpoint is not None:
        stream.load_state_dict(read_state(checkpoint))
    return stream


def bad_samples(
    recipe: Recipe, data: SampleDataset, stream: StreamFeed | None, writes: bool
) -> BadSamples:
    """Who counts the samples that are skipped."""
    report = recipe.output / REPORT
    if stream is None:
        return BadSamples(report, data.allowed, len(data), writes)
    return StreamedBadSamples(report, recipe.data.max_bad, lambda: stream.seen, writes)
