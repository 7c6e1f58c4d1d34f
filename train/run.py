"""One run, from a recipe to a trained model: read this to know what training does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune import Attached
from itprune.families import find_family
from train.blank import blank_images
from train.budgets import Evaluation
from train.data.collate import Collator
from train.data.dataset import SampleDataset, build_dataset
from train.data.encode import Encoder
from train.data.feed import Feed
from train.data.stream import StreamFeed
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
    fit_encoder,
    needs_calibration,
    routed,
    save_beside,
    trained_method,
    write_recipe,
)
from train.recipe.arguments import check_reentry, on_cpu, training_arguments
from train.recipe.config import Recipe
from train.record import Record
from train.reports import prepare_reports
from train.resume import agree, find_checkpoint
from train.router import RouterTrainer
from train.streaming import bad_samples, open_stream, ready_stream
from train.trainer import PruneTrainer, StepCallback


@dataclass(frozen=True)
class Data:
    """What a run reads, and who makes tensors of it."""

    processor: Any
    encoder: Encoder
    collator: Collator
    train: SampleDataset
    """Of a stream, its first samples: what is calibrated on."""
    val: SampleDataset | None
    stream: StreamFeed | None

    @property
    def samples(self) -> dict[str, int | None]:
        """How many there are; None: nobody knows (a stream), or there are none."""
        train = len(self.train) if self.stream is None else None
        return {"train": train, "val": len(self.val) if self.val is not None else None}


def run(
    recipe: Recipe, launch: Launch, resume: bool = False, stop: StopRequest | None = None
) -> None:
    """Trains as the recipe says; leaves model, pruner, processor, recipe and record in its folder.

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
    args, fsdp = prepare_arguments(recipe, launch)
    agree(checkpoint)
    data = open_data(recipe, args)
    model, attached = build_model(recipe, args, fsdp, data.processor, checkpoint)
    fit_encoder(data.encoder, recipe, model, attached)
    trainer = make_trainer(recipe, args, fsdp, data, model, attached, checkpoint, stop)
    trainer.bad.restore() if checkpoint is not None else trainer.bad.forget()
    if args.process_index == 0:
        print(describe(recipe, trainer, checkpoint))
        write_recipe(recipe.output, recipe)
    record = Record.open(recipe, args, launch, checkpoint, data.samples)
    with record.watched(trainer):
        train(trainer, record, checkpoint)


def prepare_arguments(recipe: Recipe, launch: Launch) -> tuple[TrainingArguments, bool]:
    """The Trainer's arguments, and whether FSDP shards; nothing is loaded yet.

    Raises:
        ValueError: what they and the launcher say does not fit together.
    """
    zero = deepspeed_config(recipe.trainer, launch)
    deepspeed = zero is not None or launch.accelerate_deepspeed
    if deepspeed:
        prepare_deepspeed(on_cpu(recipe.trainer))
    changes = {"deepspeed": zero, **fsdp_options(recipe.trainer, launch, recipe.mode)}
    unused = recipe.trains_vision
    args = training_arguments(recipe.trainer, recipe.data.workers, unused=unused, **changes)
    fsdp = launch.accelerate_fsdp is not None or bool(args.fsdp)
    check_reentry(args, args.world_size > 1 and not (fsdp or deepspeed), unused=unused)
    check_world(args, launch)
    prepare_reports(args)
    return args, fsdp


def open_data(recipe: Recipe, args: TrainingArguments) -> Data:
    """Opens all files of the `data` section.

    Raises:
        ValueError: anything wrong with them.
    """
    section, stream = recipe.data, None
    processor = load_processor(recipe.model.path)
    encoder = Encoder(processor, section.max_length)
    collator = Collator.of(processor)
    if section.streaming:
        stream = open_stream(recipe, args, encoder, collator)
        train = stream.first(CALIBRATION_SAMPLES)
    else:
        train = build_dataset(section, section.train, encoder, section.weights)
    val = build_dataset(section, section.val, encoder) if section.val else None
    return Data(processor, encoder, collator, train, val, stream)


def build_model(
    recipe: Recipe, args: TrainingArguments, fsdp: bool, processor: Any, checkpoint: Path | None
) -> tuple[nn.Module, Attached | None]:
    """The model ready to train, with its pruner inside.

    Raises:
        ValueError: the recipe asks for what this model does not have.
    """
    model = load_model(recipe, bf16=args.bf16, sharded=fsdp)
    set_seed(args.seed)  # a method's own parts, too, start from the same numbers everywhere
    attached = attach_pruner(model, recipe, processor, checkpoint)
    check_trains(model)
    check_rates(model, recipe.model.learning_rates)
    routing = recipe.mode == "router"
    blank_images(model, attached, fsdp=fsdp, routing=routing, processes=args.world_size)
    return model, attached


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    fsdp: bool,
    data: Data,
    model: nn.Module,
    attached: Attached | None,
    checkpoint: Path | None,
    stop: StopRequest | None,
) -> PruneTrainer:
    """Joins model and data to a Trainer.

    Raises:
        ValueError: where a checkpoint left the data cannot be read.
    """
    routing = recipe.mode == "router"
    pruning = None if routing else attached  # routers look at whole samples
    visual_ids = find_family(base_of(model)).visual_token_ids
    meter = Meter(pruning, visual_ids)
    method = trained_method(attached)
    make: Callable[..., PruneTrainer] = PruneTrainer
    if method is not None and routing:
        make = partial(RouterTrainer, routers=routed(method)[0])
    return make(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.val,
        data_collator=data.collator,
        callbacks=make_callbacks(recipe, args, data, meter, attached),
        rates=recipe.model.learning_rates,
        meter=meter,
        bad=bad_samples(recipe, data.train, data.stream, writes=args.process_index == 0),
        feed=make_feed(recipe, args, data, visual_ids, pruning, checkpoint),
        evaluation=None if routing else Evaluation(attached, recipe.eval_keep),
        distill=Distiller(attached, recipe.distill) if attached and recipe.distill else None,
        save_beside=partial(
            save_beside, processor=data.processor, attached=attached, recipe=recipe
        ),
        attached=pruning,
        base=recipe.model.path,
        method=method,
        layers=sharded_layers(model) if fsdp else None,
        stop=stop,
    )


def make_feed(
    recipe: Recipe,
    args: TrainingArguments,
    data: Data,
    visual_ids: tuple[int, ...],
    pruning: Attached | None,
    checkpoint: Path | None,
) -> Feed | None:
    """Where batches come from, if not from Trainer's own loader."""
    limit = recipe.data.max_tokens_per_batch
    if data.stream is not None:
        return ready_stream(data.stream, limit, visual_ids, pruning, checkpoint)
    if limit is None:
        return None
    return token_batches(recipe, args, data.train, data.collator, visual_ids, pruning, checkpoint)


def make_callbacks(
    recipe: Recipe, args: TrainingArguments, data: Data, meter: Meter, attached: Attached | None
) -> list[TrainerCallback]:
    """Calibration, where it is due, and what follows each step."""
    steps = StepCallback(meter, attached)
    if not needs_calibration(attached):
        return [steps]
    workers = args.dataloader_num_workers
    batches = partial(calibration_batches, data.train, data.collator, workers)
    return [CalibrateCallback(attached, batches, late=recipe.mode == "router"), steps]


def train(trainer: PruneTrainer, record: Record, checkpoint: Path | None) -> None:
    """Trains, and saves what came of it."""
    with trainer.guarded(record.lost):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        trainer.bad.settle()
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
