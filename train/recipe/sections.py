"""The sections of a recipe as dataclasses: every option of ours, once.

`prune` is `itprune.PruneConfig` and `trainer` holds transformers' TrainingArguments unchanged, so
both are documented where they live. A string under a field is its documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from itprune.options import check_choice, check_fraction, check_positive

MODES = ("lora", "qlora", "full", "projector", "router")
ADAPTED = ("lora", "qlora")
"""Modes that train adapters."""
PARTS = ("vision", "projector", "language", "pruner")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("auto", "llava", "messages", "dataset")
QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class Rates:
    """`model.learning_rates`: of the parts that shall not have `trainer.learning_rate`."""

    vision: float | None = None
    projector: float | None = None
    language: float | None = None
    """Of adapters, too."""
    pruner: float | None = None
    """Of a method's trained parts."""

    def __post_init__(self) -> None:
        for part in PARTS:
            rate = getattr(self, part)
            if rate is not None and rate < 0:
                raise ValueError(f"model.learning_rates.{part}: must be 0 or more, got {rate}")


@dataclass(frozen=True)
class ModelSection:
    """`model`: what is trained."""

    path: str
    """Folder or hub name of the base model, with safetensors weights."""
    mode: str | None = None
    """lora: adapters on the language model (default when there is a `lora` section); qlora: these
    on a language model in 4 bits; full: every weight that is not frozen (default otherwise);
    projector: only the projector (pretraining); router: only the exit routers of the method
    `dyvte`. All but the last train a method's own parts, too."""
    dtype: str = "auto"
    """Type of the loaded weights. auto: bfloat16 for frozen weights when `trainer.bf16` is on,
    float32 otherwise; weights that train are float32 unless the type is named here."""
    attn_implementation: str | None = None
    """transformers' attention: sdpa, eager, flash_attention_2, ...; null: its own choice."""
    freeze: tuple[str, ...] = ("vision",)
    """Parts that mode `full` leaves as they are: vision, projector, language; the other modes have
    none to choose. `pruner`, the trained parts of the method, can be frozen in every mode."""
    learning_rates: Rates = Rates()
    """Learning rates of parts; the others have `trainer.learning_rate`, and its schedule all."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_choice("model.mode", self.mode, MODES)
        check_choice("model.dtype", self.dtype, DTYPES)
        for part in self.freeze:
            check_choice("model.freeze", part, PARTS)


@dataclass(frozen=True)
class DataSection:
    """`data`: the samples and how they are read."""

    train: tuple[str, ...]
    """LLaVA JSON, JSONL with `messages` and `images`, a saved or named `datasets` dataset; several
    files as `part-{00..31}.jsonl` or `part-*.jsonl`; with `streaming` tar shards and .jsonl.gz."""
    weights: tuple[float, ...] | None = None
    """A mixture: one number for each entry of `train`, in whose proportion samples are drawn. null:
    every sample once an epoch."""
    streaming: bool = False
    """Read `train` from front to end without an index (tar shards, files on slow storage); needs
    `trainer.max_steps`."""
    shuffle_buffer: int = 1000
    """With `streaming`: samples among which the next one is drawn."""
    val: tuple[str, ...] = ()
    """Samples of the evaluation loss; computed when `trainer.eval_strategy` says so."""
    image_root: str | None = None
    """Folder that image paths are relative to and must stay in. null: the data file's folder, and
    absolute paths are accepted."""
    format: str = "auto"
    """llava, messages, dataset; auto: by file ending and first record."""
    split: str = "train"
    """Split of a `datasets` dataset that has several."""
    max_length: int = 2048
    """Tokens of a sample, image tokens included; a longer text is cut at its end."""
    max_tokens_per_batch: int | None = None
    """Kept tokens of a batch of one process: as many samples as fit, instead of
    `trainer.per_device_train_batch_size`."""
    workers: int = 2
    """Background processes that read and encode samples (per training process)."""
    max_bad: float = 0.01
    """Fraction of bad samples that is skipped and reported; above it the run stops."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train: names no file")
        check_choice("data.format", self.format, FORMATS)
        if self.weights is not None:
            if len(self.weights) != len(self.train):
                raise ValueError(
                    f"data.weights: must be one for each entry of data.train, got "
                    f"{len(self.weights)} for {len(self.train)}"
                )
            for weight in self.weights:
                if not 0 < weight < math.inf:
                    raise ValueError(
                        f"data.weights: must be above 0, got {weight:g}; leave an entry out of "
                        "data.train to read nothing of it"
                    )
        if self.max_length < 1:
            raise ValueError(f"data.max_length: must be at least 1, got {self.max_length}")
        check_positive("data.max_tokens_per_batch", self.max_tokens_per_batch)
        check_positive("data.shuffle_buffer", self.shuffle_buffer)
        if self.workers < 0:
            raise ValueError(f"data.workers: must be 0 or more, got {self.workers}")
        if self.max_bad != 0:
            check_fraction("data.max_bad", self.max_bad)


@dataclass(frozen=True)
class LoraSection:
    """`lora`: adapters on the language model, everything else frozen."""

    r: int = 128
    """Rank of the adapters."""
    alpha: float = 256
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the language model's linear layers that get an adapter."""
    train_projector: bool = False
    """Train the projector fully beside the adapters; saved with them."""
    modules_to_save: tuple[str, ...] = ()
    """Further modules that train fully and are saved with the adapters."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r: must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: must be in [0, 1), got {self.dropout}")
        if not self.target:
            raise ValueError("lora.target: names no layer")


@dataclass(frozen=True)
class QuantSection:
    """`quant`: how mode `qlora` stores the frozen language model (bitsandbytes)."""

    type: str = "nf4"
    """nf4 or fp4."""
    double: bool = True
    """Quantise the quantisation constants, too."""

    def __post_init__(self) -> None:
        check_choice("quant.type", self.type, QUANT_TYPES)


@dataclass(frozen=True)
class DistillSection:
    """`distill`: the model on all tokens teaches itself on the kept ones."""

    every: int = 4
    """Every n-th step has the second forward, on all tokens; none where its budget is 1.0."""
    weight: float = 1.0
    """Of the divergence beside the loss."""
    temperature: float = 1.0
    """Logits are divided by it, the divergence is multiplied by its square."""

    def __post_init__(self) -> None:
        check_positive("distill.every", self.every)
        for name in ("weight", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"distill.{name}: must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvalSection:
    """`eval`: what an evaluation in training measures on `data.val`, whenever
    `trainer.eval_strategy` says so."""

    keep: tuple[float, ...] = ()
    """Budgets to evaluate at, one after the other; metrics without a budget in their name are the
    first one's. None: the budget in force, of a list its first."""

    def __post_init__(self) -> None:
        for keep in self.keep:
            check_fraction("eval.keep", keep)
            if self.keep.count(keep) > 1:
                raise ValueError(f"eval.keep: {keep} stands there twice; name every budget once")


def metric(what: str, keep: float | None = None) -> str:
    """Name of `loss` or `accuracy`, at a budget, without the evaluation's prefix."""
    return what if keep is None else f"{what}_keep_{float(keep)}"


def metrics(budgets: tuple[float, ...]) -> list[str]:
    """All names an evaluation has."""
    return [metric(what, keep) for keep in (None, *budgets) for what in ("loss", "accuracy")]
