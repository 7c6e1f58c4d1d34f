"""One run, from a recipe to a trained model: read this to know what training does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from train.arguments import on_cpu, training_arguments
from train.bad_samples import BadSamples
from train.blank import BlankImage
from train.config import Recipe
from train.data.collate import Collator
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.launcher import Launch, check_world, deepspeed_config, prepare_deepspeed
from train.meter import Meter
from train.model import load_model, load_processor, trains_images
from train.pruning import (
    CalibrateCallback,
    attach_pruner,
    calibration_batches,
    needs_calibration,
    save_beside,
    write_recipe,
)
from train.resume import find_checkpoint
from train.trainer import PruneTrainer, StepCallback


def run(recipe: Recipe, launch: Launch, resume: bool = False) -> None:
    """Trains as the recipe says and leaves model, pruner, processor and recipe in its folder.

    Args:
        recipe: a validated recipe.
        launch: who started this process.
        resume: whether there must be a checkpoint to go on from; if there is one, a run goes on.

    Raises:
        ValueError: anything the user can put right, in one sentence.
    """
    checkpoint = find_checkpoint(recipe, resume)
    zero = deepspeed_config(recipe.trainer, launch)
    if zero is not None:
        prepare_deepspeed(on_cpu(recipe.trainer))
    args = training_arguments(
        recipe.trainer, recipe.data.workers, unused=recipe.trains_vision, deepspeed=zero
    )
    check_world(args, launch)

    processor = load_processor(recipe.model.path)
    encoder = Encoder(processor, recipe.data.max_length)
    train_data = build_dataset(recipe.data, recipe.data.train, encoder)
    val_data = build_dataset(recipe.data, recipe.data.val, encoder) if recipe.data.val else None
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id
    collator = Collator(tokenizer.eos_token_id if pad is None else pad)

    set_seed(args.seed)  # adapters start from random numbers, which must be the same everywhere
    model = load_model(recipe, bf16=args.bf16)
    if trains_images(model) or is_deepspeed_zero3_enabled():
        # In training on several ranks the pruner does the same by itself.
        BlankImage(model, processor, training=recipe.prune is None or args.world_size == 1)
    attached = attach_pruner(model, recipe, processor, checkpoint)
    meter = Meter(attached, processor.image_token_id)
    callbacks: list[TrainerCallback] = [StepCallback(meter, attached)]
    if needs_calibration(attached):
        workers = args.dataloader_num_workers
        batches = partial(calibration_batches, train_data, collator, workers)
        callbacks.insert(0, CalibrateCallback(attached, batches))
    writes = args.process_index == 0
    bad = BadSamples(
        recipe.output / "bad_samples.jsonl", train_data.allowed, len(train_data), writes
    )
    trainer = PruneTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=val_data,
        data_collator=collator,
        callbacks=callbacks,
        meter=meter,
        bad=bad,
        save_beside=lambda folder: save_beside(folder, processor, attached, recipe),
    )
    bad.restore() if checkpoint is not None else bad.forget()
    if writes:
        print(describe(recipe, trainer, checkpoint))
        write_recipe(recipe.output, recipe)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    bad.settle()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # a rank that leaves first would end the others
    trainer.accelerator.end_training()


def describe(recipe: Recipe, trainer: PruneTrainer, checkpoint: Path | None) -> str:
    """One line on what is about to run."""
    parameters = list(trainer.model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    share = f"{trained:,} of {total:,} weights" if total else "sharded weights"
    plugin = trainer.accelerator.state.deepspeed_plugin
    keep = "dense" if recipe.prune is None else f"keep {recipe.prune.to_dict()['keep']}"
    return (
        f"{recipe.mode}, {keep}: training {share}, "
        f"{trainer.args.world_size} process(es) on {trainer.args.device.type}"
        + (f", DeepSpeed ZeRO-{plugin.zero_stage}" if plugin is not None else "")
        + (f", going on from {checkpoint}" if checkpoint is not None else "")
    )
