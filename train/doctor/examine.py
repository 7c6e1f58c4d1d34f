"""What a recipe would do here, without training: the run is prepared as far as that goes without
weights, and what stands against it is collected instead of stopping at the first.

The model is built on the meta device with its adapters, its freezing and its pruner, so that what
is refused here is what a run refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from itprune.families import find_family
from train.check import check_trainer
from train.data.collate import Collator
from train.data.dataset import SampleDataset, build_dataset
from train.data.encode import Encoder
from train.data.stream import build_stream, fixed
from train.doctor.forecast import Kept, Spread, Survey, kept_at, survey
from train.doctor.memory import Memory, Setup, dtype_of, estimate, four_bit_names
from train.doctor.room import Batches, Disk, batches_of, device_memory, disk_of
from train.model import base_of, check_trains, load_processor, prepare
from train.pruning import attach_pruner, fit_encoder
from train.quant import skeleton
from train.recipe.arguments import on_cpu
from train.recipe.config import Recipe
from train.recipe.contradictions import need
from train.resume import find_checkpoint

T = TypeVar("T")
TELLING = 3
"""Bad samples of a survey below which it cannot tell whether too many of all are bad."""


@dataclass
class Findings:
    """Everything `itprune doctor CONFIG` tells."""

    recipe: str
    mode: str
    model: str
    processes: int
    device: str
    family: str = ""
    weights: int = 0
    """Of the model, adapters included."""
    trained: int = 0
    data: Survey | None = None
    budgets: list[Kept] = field(default_factory=list)
    batches: Batches | None = None
    memory: Memory | None = None
    device_memory: int = 0
    """Bytes a process has; 0: unknown."""
    disk: Disk | None = None
    checkpoint: str | None = None
    """That the run would go on from."""
    problems: list[str] = field(default_factory=list)
    """Why the run would not start, or would stop."""
    warnings: list[str] = field(default_factory=list)

    @property
    def starts(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        data = self.data
        values = {k: v for k, v in vars(self).items() if k not in ("data", "budgets", "memory")}
        return {
            **values,
            "batches": None if self.batches is None else asdict(self.batches),
            "disk": None if self.disk is None else asdict(self.disk) | {"needed": self.disk.needed},
            "memory": None if self.memory is None else self.memory.to_dict(),
            "budgets": [kept.to_dict() for kept in self.budgets],
            "data": None if data is None else {
                "samples": data.total,
                "examined": data.asked,
                "bad": dict(data.bad),
                "examples": data.examples,
                "cut": data.cut,
                "text": Spread.of([s.text for s in data.sizes]).to_dict(),
                "visual": Spread.of([s.visual for s in data.sizes]).to_dict(),
                "supervised": Spread.of([s.supervised for s in data.sizes]).to_dict(),
                "learnt": data.learnt,
                "learnt_at": data.learnt_at,
            },
            "starts": self.starts,
        }  # fmt: skip


def examine(recipe: Recipe, name: str, processes: int, samples: int) -> Findings:
    """Examines a recipe.

    Args:
        recipe: validated.
        name: of its file, for the report.
        processes: that would train.
        samples: of the data that are encoded.
    """
    cpu = on_cpu(recipe.trainer)
    found = Findings(
        recipe=name,
        mode=recipe.mode,
        model=recipe.model.path,
        processes=processes,
        device="cpu" if cpu else torch.accelerator.current_accelerator().type,  # type: ignore[union-attr]
        device_memory=device_memory(cpu, processes),
    )
    _packages(recipe, found)
    args = _try(found, lambda: check_trainer(recipe))
    setup = _try(found, lambda: Setup.of(recipe, processes))
    going_on = _try(found, lambda: find_checkpoint(recipe, False, speaks=False))
    found.checkpoint = None if going_on is None else str(going_on)
    processor = _try(found, lambda: load_processor(recipe.model.path))
    model = _try(found, lambda: build(recipe))
    pruned = _try(found, lambda: _attach(model, recipe, processor)) if model and processor else None
    if model is not None:
        found.family = base_of(model).config.model_type
        found.weights = sum(p.numel() for p in model.parameters())
        found.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _try(found, lambda: check_trains(model))
    if model is None or processor is None or args is None or setup is None:
        return found
    if recipe.prune is not None and pruned is None:
        return found
    encoder = _try(found, lambda: _encoder(recipe, processor, model, pruned))
    data = _try(found, lambda: _data(recipe, encoder, processor)) if encoder else None
    if recipe.data.val and encoder is not None:
        _try(found, lambda: build_dataset(recipe.data, recipe.data.val, encoder))
    if data is None or encoder is None:
        return found
    found.data = survey(data, encoder, samples, find_family(base_of(model)).tower.config)
    if recipe.data.streaming:
        found.data.total = 0
    _judge_data(recipe, found, found.data)
    found.budgets = _budgets(recipe, found.data, pruned)
    if found.data.sizes:
        found.batches = batches_of(recipe, args, found.data, found.budgets, pruned, processes)
        quantised = four_bit_names(model) if recipe.mode == "qlora" else set()
        found.memory = estimate(model, setup, found.batches.largest, quantised)
        found.disk = disk_of(recipe, args, model, found.memory, found.batches, setup)
        _judge_room(found)
    return found


def usual_processes(recipe: Recipe) -> int:
    """That `itprune train` starts unless told: one a GPU, one on a CPU."""
    return 1 if on_cpu(recipe.trainer) else torch.accelerator.device_count()


def _try(found: Findings, step: Callable[[], T]) -> T | None:
    """Runs a step of the preparation; what it refuses is a problem of the run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing runs, so nothing has to be calibrated
            return step()
    except ValueError as error:
        found.problems.append(str(error))
        return None


# ------------------------------------------------------------------------------------ the model
def build(recipe: Recipe) -> Any:
    """The model as it will train, without its weights.

    Raises:
        ValueError: no model can be made of the recipe.
    """
    model = skeleton(recipe.model.path).to(dtype_of(recipe))
    with torch.device("meta"):
        return prepare(model, recipe)


def _attach(model: Any, recipe: Recipe, processor: Any) -> Any | None:
    with torch.device("meta"):
        return attach_pruner(model, recipe, processor, None)


def _encoder(recipe: Recipe, processor: Any, model: Any, pruned: Any | None) -> Encoder:
    encoder = Encoder(processor, recipe.data.max_length)
    fit_encoder(encoder, recipe, model, pruned)
    return encoder


# ------------------------------------------------------------------------------------- the data
def _data(recipe: Recipe, encoder: Encoder, processor: Any) -> SampleDataset:
    section = recipe.data
    if not section.streaming:
        return build_dataset(section, section.train, encoder, section.weights)
    stream = build_stream(section, encoder, Collator.of(processor), fixed(1))
    return stream.first(1000)


def _judge_data(recipe: Recipe, found: Findings, data: Survey) -> None:
    bad = sum(data.bad.values())
    if not data.sizes:
        found.problems.append(
            f"data.train: none of the {data.asked} samples examined can be used, the first: "
            f"{next(iter(data.examples.values()), 'there is none')}"
        )
    elif bad and data.bad_share > recipe.data.max_bad:
        sentence = (
            f"data.max_bad: {bad} of {data.asked} samples examined are bad ({data.bad_share:.0%}), "
            f"but {recipe.data.max_bad:.1%} are allowed, above which a run stops"
        )
        sure = data.asked == data.total or bad >= TELLING
        (found.problems if sure else found.warnings).append(sentence)
    missing = data.bad["images missing"]
    if missing and missing * 2 > data.asked:
        found.warnings.append("data.image_root: most images are missing; is it the right folder?")
    if data.cut:
        found.warnings.append(
            f"data.max_length: the text of {data.cut} of {data.asked} samples is cut at its end"
        )


def _budgets(recipe: Recipe, data: Survey, pruned: Any | None) -> list[Kept]:
    if pruned is None or recipe.prune is None:
        return [kept_at(data.sizes, 1.0, 1.0)]
    now, made = pruned.keep, []
    for keep in dict.fromkeys(recipe.prune.budgets):
        pruned.set_keep(keep)
        made.append(kept_at(data.sizes, keep, pruned.enters))
    pruned.set_keep(now)
    return made


# ------------------------------------------------------------------------------------- the room
def _judge_room(found: Findings) -> None:
    gb = 1 << 30
    if found.disk is not None and found.disk.needed > found.disk.free:
        found.warnings.append(
            f"trainer.output_dir: {found.disk.checkpoints} checkpoint(s) and the trained model "
            f"take about {found.disk.needed / gb:.1f} GB, {found.disk.free / gb:.1f} GB are free; "
            "set trainer.save_total_limit, or another folder"
        )
    if found.memory is not None and 0 < found.device_memory < found.memory.total:
        found.warnings.append(
            f"memory: a process takes about {found.memory.total / gb:.1f} GB and has "
            f"{found.device_memory / gb:.1f} GB; less takes: a smaller batch, "
            "trainer.gradient_checkpointing, model.mode=qlora, or trainer.deepspeed with ZeRO"
        )


def _packages(recipe: Recipe, found: Findings) -> None:
    if recipe.trainer.get("deepspeed") is not None:
        _try(found, lambda: need("deepspeed", "trainer.deepspeed", "ZeRO", "train"))
    if (
        str(recipe.model.attn_implementation).startswith("flash")
        and find_spec("flash_attn") is None
    ):
        found.problems.append(
            "model.attn_implementation: flash-attn is not installed; pip install flash-attn "
            "--no-build-isolation, or use sdpa"
        )
