"""Doctor: what pruning would meet in a model's folder, told without its weights.

The model is built on the meta device from its config alone; the picture goes through the real
processor. Every method is attached once, so that what is refused here is what `attach` refuses.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from itprune.attach import attach
from itprune.checkpoint import ADAPTER_FILE, PRUNER_FILE, PrunerRecord, base_folder
from itprune.config import PruneConfig
from itprune.families import find_family
from itprune.families.base import Family, PatchFamily, TokenFamily
from itprune.inputs import load_processor
from itprune.methods import methods
from itprune.methods.base import Method


@dataclass(frozen=True)
class Picture:
    """What one picture becomes."""

    size: tuple[int, int]
    """Width and height in pixels."""
    visual_tokens: int
    """Positions it takes in the LLM's input, separators included."""
    separators: int
    """Those that hold no part of it, such as line ends of a mosaic of tiles."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tokens: the picture, its tiles, or a mosaic of them."""


@dataclass(frozen=True)
class Pruning:
    """Where a method acts, and what it aims at."""

    method: str
    keep: float | None
    places: tuple[str, ...]
    before_llm: bool
    """Stage 1: it acts before the LLM."""
    layers: tuple[int, ...]
    """Stage 2: 0-based LLM layers after which it acts."""
    shares: tuple[float, ...] | None
    """Visual tokens aimed at, as fractions: into the LLM, and behind each of these layers."""
    positions: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `itprune doctor` tells."""

    model: str
    family: str
    model_class: str
    versions: Mapping[str, str]
    llm_layers: int
    llm_width: int
    position_axes: int
    vision_blocks: int
    score_block: int
    """0-based encoder block whose attention scores the tokens."""
    score: str
    acts_on: str
    """patches, before the projector; or tokens, as they enter the LLM."""
    picture: Picture | None
    """None: there is nothing to make it with."""
    pruning: Pruning | None
    """None: the method cannot run here; `refused` says why."""
    runs: tuple[str, ...]
    """Methods that can run on this model."""
    refused: Mapping[str, str]
    """The others, with the reason."""
    missing: tuple[str, ...]
    """What stands against using the folder on this machine, one sentence each."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    folder: Path,
    size: tuple[int, int] = (448, 448),
    method: str | None = None,
    keep: float | None = None,
) -> Diagnosis:
    """Examines a checkpoint's or an ordinary model's folder.

    Args:
        folder: holds config.json, or an adapter whose base model does.
        size: width and height of a picture in pixels.
        method: instead of the checkpoint's, or of the default one.
        keep: likewise.

    Raises:
        ValueError: not a model, an unknown family, a picture the processor refuses, or a method
            that cannot run here.
    """
    base = Path(base_folder(folder)) if (folder / ADAPTER_FILE).exists() else folder
    model = _model(base)
    family = find_family(model)
    wanted = _wanted(folder, method, keep)
    missing = []
    try:
        processor = load_processor(folder)
    except ValueError as error:
        processor = None
        missing.append(str(error))
    if not any(base.glob("*.safetensors")):
        missing.append(f"{base}: no safetensors weights, so the model itself cannot be loaded")
    host = family.host
    runs, refused = _methods(model, wanted.final_keep)
    return Diagnosis(
        model=str(folder),
        family=model.config.model_type,
        model_class=type(model).__name__,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        llm_layers=host.depth,
        llm_width=host.width,
        position_axes=family.position_axes,
        vision_blocks=host.vision_blocks,
        score_block=host.feature_block,
        score="attention of CLS" if host.has_cls else "attention received",
        acts_on="patches" if isinstance(family, PatchFamily) else "tokens",
        picture=_picture(family, processor, base, size),
        pruning=_pruning(family, wanted) if method is not None or wanted.method in runs else None,
        runs=runs,
        refused=refused,
        missing=tuple(missing),
    )


def _model(base: Path) -> PreTrainedModel:
    """The model of a config, without weights.

    Raises:
        ValueError: no model can be made of its values.
    """
    try:
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # a wrong value may break transformers anywhere
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{base / 'config.json'}: no model can be made of it ({said})") from error


# ------------------------------------------------------------------------------------ methods
def _wanted(folder: Path, method: str | None, keep: float | None) -> PruneConfig:
    """The checkpoint's config, or the default one, changed by the caller's wishes."""
    known = (folder / PRUNER_FILE).exists()
    config = PrunerRecord.read(folder).config if known else PruneConfig()
    if method is not None and method != config.method:
        config = PruneConfig(method, config.final_keep)
    return config if keep is None else config.replace(keep=keep)


@contextmanager
def _attached(model: PreTrainedModel, config: PruneConfig) -> Any:
    """The method at work in the model, its own weights without memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing runs, so nothing has to be calibrated
        attached = attach(model, config)
    try:
        yield attached
    finally:
        attached.detach()


def _methods(model: PreTrainedModel, keep: float | None) -> tuple[tuple[str, ...], dict[str, str]]:
    runs, refused = [], {}
    for name in methods():
        try:
            with _attached(model, PruneConfig(name, keep)):
                runs.append(name)
        except ValueError as error:
            refused[name] = str(error)
    return tuple(runs), refused


def _pruning(family: Family, config: PruneConfig) -> Pruning:
    with _attached(family.model, config) as attached:
        method = attached.method
        method.share(config.final_keep)
        idle = method.idle
        return Pruning(
            method=config.method,
            keep=method.keep,
            places=tuple(method.places),
            before_llm=not idle and method.acts_before_llm,
            layers=() if idle else method.layers(),
            shares=(1.0,) if idle else method.shares(),
            positions=_positions(config, family, method),
        )


def _positions(config: PruneConfig, family: Family, method: Method) -> str:
    """Several position ids a token stay the host's own, whatever the method publishes."""
    return config.positions or ("original" if family.position_axes > 1 else method.positions)


# ------------------------------------------------------------------------------------ a picture
def _picture(family: Family, processor: Any, base: Path, size: tuple[int, int]) -> Picture | None:
    """Through the processor, or through its part for images where that is all there is."""
    image = Image.new("RGB", size)
    if processor is not None:
        inputs = processor(text=[processor.image_token], images=[[image]], return_tensors="pt")
        placeholders = torch.tensor(family.visual_token_ids)
        written: int | None = int(torch.isin(inputs["input_ids"], placeholders).sum())
    else:
        inputs, written = _image_inputs(type(family.model.config), base, image), None
        if inputs is None:
            return None
    try:
        grids, separators = _grids(family, dict(inputs))
    except ValueError as error:
        raise ValueError(f"{base}: {error}") from None
    made = sum(rows * columns for rows, columns in grids) + separators
    if written is not None and written != made:
        raise ValueError(
            f"{base}: its processor writes {written} image tokens for a picture of {size[0]} x "
            f"{size[1]} pixels, but the model makes {made} of it; processor and config.json do not "
            "belong together"
        )
    return Picture(size, made, separators, grids)


def _image_inputs(config: type, base: Path, image: Image.Image) -> Mapping[str, Any] | None:
    """What the image processor alone makes, called as its processor would call it."""
    try:
        part = AutoImageProcessor.from_pretrained(base)
    except (OSError, ValueError, ImportError):
        return None
    whole = PROCESSOR_MAPPING[config]
    options = whole.images_kwargs if "images_kwargs" in dir(whole) else {}
    made: Mapping[str, Any] = part(images=[image], return_tensors="pt", **options)
    return made


def _grids(family: Family, inputs: dict[str, Any]) -> tuple[tuple[tuple[int, int], ...], int]:
    """The grids of one picture, and its separators."""
    if isinstance(family, PatchFamily):
        rows, columns = family.grid(inputs["pixel_values"])
        slots, _ = family.slot_grids(2 * rows * columns)  # room for one that has a CLS beside it
        return ((rows, columns),), int(slots[0]) - rows * columns
    assert isinstance(family, TokenFamily)
    accepted = inspect.signature(family.model.base_model.get_image_features).parameters
    arguments = {k: v for k, v in inputs.items() if k in accepted and isinstance(v, Tensor)}
    geometry = family.geometry("image", arguments)
    grids = tuple((int(rows), int(columns)) for rows, columns in geometry.grid.tolist())
    if geometry.separator is None:
        return grids, 0
    return grids, len(geometry.separator[geometry.separator >= 0].unique())
