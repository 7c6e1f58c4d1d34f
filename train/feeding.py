"""Trainer on a feed: its batches instead of a loader's, its state in every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from train.data.batches import Budget, Ranks, Samples, TokenBatches
from train.data.collate import Collator
from train.data.dataset import SampleDataset
from train.data.feed import Feed, FeedLoader, read_state, write_state
from train.data.mixture import EpochSampler
from train.meter import Meter
from train.recipe.config import Recipe

NEARLY = 1e-6
"""Rounding in a count of epochs."""


def token_batches(
    recipe: Recipe,
    args: Any,
    data: Samples,
    collator: Collator,
    visual_ids: Sequence[int],
    attached: Any | None,
    checkpoint: Path | None,
) -> TokenBatches:
    """The feed of `data.max_tokens_per_batch`; sets what Trainer must know of it in `args`.

    Args:
        recipe: the run.
        args: TrainingArguments; a run given in epochs gets its forecast of `max_steps`.
        data: the training data.
        collator: makes batches.
        visual_ids: placeholders of visual tokens.
        attached: the pruner in force; None: every token is kept.
        checkpoint: where the run goes on from.

    Raises:
        ValueError: the checkpoint's state is missing or damaged, or no sample can be used.
    """
    assert recipe.data.max_tokens_per_batch is not None
    config = attached.config if attached is not None else None
    workers = args.dataloader_num_workers
    feed = TokenBatches(
        data,
        collator,
        visual_ids,
        Budget(
            tokens=recipe.data.max_tokens_per_batch,
            packed=attached is not None and attached.packs,
            keep=lambda step, total: config.keep_at(step, total, args.seed) if config else 1.0,
            steps=max(args.max_steps, 0),
        ),
        Ranks(args.process_index, args.world_size, args.gradient_accumulation_steps),
        args.data_seed if args.data_seed is not None else args.seed,
        {
            "num_workers": workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        },
    )
    if checkpoint is not None:
        feed.load_state_dict(read_state(checkpoint))
    if args.max_steps <= 0:
        args.max_steps = feed.forecast(args.num_train_epochs)
        if args.process_index == 0:
            print(
                f"data.max_tokens_per_batch: about {args.max_steps} steps are "
                f"{args.num_train_epochs:g} epoch(s); set trainer.max_steps for another number"
            )
    return feed


class FeedingTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose batches may come from a feed.

    Args:
        feed: where they come from; None: Trainer's own loader.
    """

    meter: Meter

    def __init__(self, *args: Any, feed: Feed | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feed = feed
        if feed is not None:
            self.args.ignore_data_skip = True  # a feed goes on where it stood
            self.add_callback(FeedCallback(feed, self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data, seed = self.train_dataset, self.args.data_seed
        if not isinstance(data, SampleDataset) or data.mixture is None:
            return super()._get_train_sampler(train_dataset)
        sampler = EpochSampler(data.mixture, self.args.seed if seed is None else seed)
        self.add_callback(EpochCallback(sampler))
        return sampler

    def get_train_dataloader(self) -> Any:
        # Not prepared by accelerate, which would shard it again: a feed knows its rank, and Trainer
        # moves batches to the device itself.
        if self.feed is None:
            return super().get_train_dataloader()
        accumulation = self.args.gradient_accumulation_steps
        return FeedLoader(self.feed, lambda: self.state.global_step * accumulation)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.feed is None or not _internal_call:
            return
        assert output_dir is not None
        state = self.feed.state_dict(self.meter.counts)
        if self.args.should_save:
            write_state(Path(output_dir), state)


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a sampler which epoch begins: accelerate's loaders do not reach it where batches are
    shared out among ranks and the first ones are skipped."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch + NEARLY))


class FeedCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a feed that a step has ended, and the log which epoch that is."""

    def __init__(self, feed: Feed, trainer: FeedingTrainer) -> None:
        self.feed, self.trainer = feed, trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.feed.step(state.global_step, self.trainer.meter.counts)
        epoch = self.feed.epoch(state.global_step)
        if epoch is not None:
            state.epoch = epoch
