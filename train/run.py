"""One run, from a recipe to a trained model: read this to know what training does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune.families import find_family
from train.blank import blank_images
from train.budgets import Evaluation
from train.data.collate import Collator
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.data.feed import Feed
from train.distill import Distiller
from train.feeding import token_batches
from train.fsdp import fsdp_options, sharded_layers
from train.guards.stopping import StopRequest
from train.launcher import Launch, check_world, deepspeed_config, prepare_deepspeed
from train.meter import Meter
from train.model import (
    base_of,
    check_trains,
    load_model,
    load_processor,
    parts_of,
)
from train.optim import check_rates
from train.pruning import (
    CALIBRATION_SAMPLES,
    CalibrateCallback,
    attach_pruner,
    calibration_batches,
    entering_share,
    needs_calibration,
    routed,
    save_beside,
    trained_method,
    write_recipe,
)
from train.recipe.arguments import check_reentry, on_cpu, training_arguments
from train.recipe.config import Recipe
from train.reports import prepare_reports
from train.resume import agree, find_checkpoint
from train.router import RouterTrainer
from train.streaming import bad_samples, open_stream, ready_stream
from train.trainer import PruneTrainer, StepCallback


def run(
    recipe: Recipe, launch: Launch, resume: bool = False, stop: StopRequest | None = None
) -> None:
    """Trains as the recipe says and leaves model, pruner, processor and recipe in its folder.

    Args:
        recipe: a validated recipe.
        launch: who started this process.
        resume: whether there must be a checkpoint to go on from; if there is one, a run goes on.
        stop: a request to stop that this process may receive.

    Raises:
        ValueError: anything the user can put right, in one sentence.
        Fault: what went wrong under way, in one sentence that names what is kept.
    """
    checkpoint = find_checkpoint(recipe, resume, speaks=launch.rank == 0)
    zero = deepspeed_config(recipe.trainer, launch)
    if zero is not None or launch.accelerate_deepspeed:
        prepare_deepspeed(on_cpu(recipe.trainer))
    changes = {"deepspeed": zero, **fsdp_options(recipe.trainer, launch, recipe.mode)}
    args = training_arguments(
        recipe.trainer, recipe.data.workers, unused=recipe.trains_vision, **changes
    )
    fsdp = launch.accelerate_fsdp is not None or bool(args.fsdp)
    ddp = args.world_size > 1 and not (fsdp or zero is not None or launch.accelerate_deepspeed)
    check_reentry(args, ddp, unused=recipe.trains_vision)
    check_world(args, launch)
    agree(checkpoint)
    prepare_reports(args)

    processor = load_processor(recipe.model.path)
    encoder = Encoder(processor, recipe.data.max_length)
    collator = Collator.of(processor)
    data, stream = recipe.data, None
    if data.streaming:
        stream = open_stream(recipe, args, encoder, collator)
        train_data = stream.first(CALIBRATION_SAMPLES)
    else:
        train_data = build_dataset(data, data.train, encoder, data.weights)
    val_data = build_dataset(data, data.val, encoder) if data.val else None

    model = load_model(recipe, bf16=args.bf16, sharded=fsdp)
    set_seed(args.seed)  # a method's own parts, too, start from the same numbers everywhere
    attached = attach_pruner(model, recipe, processor, checkpoint)
    check_trains(model)
    check_rates(model, recipe.model.learning_rates)
    routing = recipe.mode == "router"
    processes = args.world_size
    blank_images(model, attached, fsdp=fsdp, routing=routing, processes=processes)
    visual_ids = find_family(base_of(model)).visual_token_ids
    pruning = None if routing else attached
    encoder.visual_share = entering_share(pruning)
    encoder.positions = base_of(model).config.get_text_config().max_position_embeddings
    feed: Feed | None = None
    if stream is not None:
        limit = data.max_tokens_per_batch
        feed = ready_stream(stream, limit, visual_ids, pruning, checkpoint)
    elif data.max_tokens_per_batch is not None:
        feed = token_batches(recipe, args, train_data, collator, visual_ids, pruning, checkpoint)
    meter = Meter(pruning, visual_ids)
    callbacks: list[TrainerCallback] = [StepCallback(meter, attached)]
    if needs_calibration(attached):
        workers = args.dataloader_num_workers
        batches = partial(calibration_batches, train_data, collator, workers)
        callbacks.insert(0, CalibrateCallback(attached, batches, late=routing))
    writes = args.process_index == 0
    bad = bad_samples(recipe, train_data, stream, writes)
    beside = partial(save_beside, processor=processor, attached=attached, recipe=recipe)
    evaluation = None if routing else Evaluation(attached, recipe.eval_keep)
    distill = None
    if attached is not None and recipe.distill is not None:
        distill = Distiller(attached, recipe.distill)
    method = trained_method(attached)
    make: Callable[..., PruneTrainer] = PruneTrainer
    if method is not None and routing:
        make = partial(RouterTrainer, routers=routed(method)[0])
    trainer = make(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=val_data,
        data_collator=collator,
        callbacks=callbacks,
        rates=recipe.model.learning_rates,
        meter=meter,
        bad=bad,
        feed=feed,
        evaluation=evaluation,
        distill=distill,
        save_beside=beside,
        attached=pruning,
        base=recipe.model.path,
        method=method,
        layers=sharded_layers(model) if fsdp else None,
        stop=stop,
    )
    bad.restore() if checkpoint is not None else bad.forget()
    if writes:
        print(describe(recipe, trainer, checkpoint))
        write_recipe(recipe.output, recipe)
    with trainer.guarded():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        bad.settle()
        trainer.progress.enter("saving the trained model")
        trainer.save_model()
        trainer.create_model_card()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()  # a rank that leaves first would end the others
    trainer.accelerator.end_training()


def describe(recipe: Recipe, trainer: PruneTrainer, checkpoint: Path | None) -> str:
    """One line on what is about to run."""
    base = base_of(trainer.model)
    total = base.num_parameters()  # which knows that two weights in 4 bits share a byte
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    whole = total and not is_deepspeed_zero3_enabled()
    share = f"{trained:,} of {total:,} weights" if whole else "sharded weights"
    owner = parts_of(base)
    parts = {owner[name] for name, p in base.named_parameters() if p.requires_grad}
    plugin = trainer.accelerator.state.deepspeed_plugin
    keep = "dense" if recipe.prune is None else f"keep {recipe.prune.to_dict()['keep']}"
    return (
        f"{recipe.mode}, {keep}: training {share} ({', '.join(sorted(parts))}), "
        f"{trainer.args.world_size} process(es) on {trainer.args.device.type}"
        + (f", DeepSpeed ZeRO-{plugin.zero_stage}" if plugin is not None else "")
        + (", FSDP2" if trainer.accelerator.is_fsdp2 else "")
        + (f", going on from {checkpoint}" if checkpoint is not None else "")
    )
