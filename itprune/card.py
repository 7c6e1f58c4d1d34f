"""The model card: README.md of a folder, with what a stranger has to know about a pruned model.

How it prunes, how much it keeps, how it did, how it is loaded. Everything is read from the folder
and from the trainer's state; a card is no source of facts of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from itprune.checkpoint import ADAPTER_FILE, PRUNER_FILE, PRUNER_WEIGHTS, PrunerRecord

CARD_FILE = "README.md"
TRAINER_STATE = "trainer_state.json"
TAG = "itprune"
SIGN = "with itprune"
"""Stands in every card of ours."""
ROWS = 10
"""Evaluations in the table: the last ones."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CLOCKS = ("_runtime", "_per_second")
FIRST = ("step", "epoch")


@dataclass(frozen=True)
class KeptShares:
    """How the shares of visual tokens that stay are distributed over samples."""

    where: str
    """What the samples were, e.g. "evaluation"."""
    samples: int
    mean: float
    quantiles: tuple[float, float, float]
    """10 %, 50 % and 90 %."""

    @classmethod
    def of(cls, shares: Iterable[float], where: str) -> KeptShares | None:
        """From one share per sample (`Totals.shares`); None: there are none."""
        values = list(shares)
        if not values:
            return None
        tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        return cls(where, len(values), mean(values), (tenths[0], tenths[4], tenths[8]))


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    adapter: bool | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    kept: KeptShares | None = None,
) -> None:
    """Writes the card of a folder that holds a model or an adapter; an older one is replaced.

    Args:
        folder: with pruner.json, where the model is a pruned one.
        name: the heading; default the folder's name.
        base: folder or hub name of the model that was tuned; default as adapter and recipe say.
        adapter: whether weights are an adapter's, where they are still to be saved.
        history: the trainer's `log_history`, for the evaluations.
        kept: how much stays of the samples that were looked at.
    """
    folder = Path(folder)
    record = PrunerRecord.read(folder) if (folder / PRUNER_FILE).exists() else None
    adapter = (folder / ADAPTER_FILE).exists() if adapter is None else adapter
    base = base or base_of(folder)
    text = "\n\n".join(
        [
            _metadata(base, adapter),
            f"# {name or folder.resolve().name}",
            _introduction(base, record),
            *_sections(record, history, kept),
            _loading(record, adapter, trained=(folder / PRUNER_WEIGHTS).exists()),
            *_recipe(record),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether a folder has no card yet, or one of ours: one that may be replaced."""
    path = folder / CARD_FILE
    return not path.exists() or SIGN in path.read_text(encoding="utf-8")


def base_of(folder: Path) -> str | None:
    """Folder or hub name of the model that was tuned, as adapter or recipe say."""
    if (folder / ADAPTER_FILE).exists():
        name = json.loads((folder / ADAPTER_FILE).read_text()).get("base_model_name_or_path")
        return str(name) if name else None
    record = PrunerRecord.read(folder) if (folder / PRUNER_FILE).exists() else None
    model = ((record and record.recipe) or {}).get("model") or {}
    return model.get("path")


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The `log_history` that a Trainer left in a folder; empty where it left none."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        return []
    history: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return history


def _metadata(base: str | None, adapter: bool) -> str:
    lines = [
        f"library_name: {'peft' if adapter else 'transformers'}",
        "license: unknown",
        "pipeline_tag: image-text-to-text",
    ]
    if base and HUB_NAME.fullmatch(base) and not Path(base).exists():  # the hub refuses paths
        lines += [f"base_model: {base}", *(["base_model_relation: adapter"] if adapter else [])]
    lines += ["tags:", f"- {TAG}", "- token-pruning"]
    return "\n".join(["---", *lines, "---"])


def _introduction(base: str | None, record: PrunerRecord | None) -> str:
    tuned = f"Tuned from `{Path(base).name if Path(base).is_absolute() else base}`" if base else ""
    if record is None:
        return f"{tuned or 'Tuned'} {SIGN}, without token pruning."
    return (
        f"{tuned or 'Tuned'} {SIGN}: visual tokens are pruned inside the forward pass, in "
        "training and at inference."
    )


def _sections(
    record: PrunerRecord | None,
    history: Sequence[Mapping[str, Any]],
    kept: KeptShares | None,
) -> Iterable[str]:
    if record is not None:
        yield _pruning(record)
        yield _kept(record, kept)
    table = evaluation_table(history)
    if table:
        yield f"## Evaluation\n\n{table}"


def _recipe(record: PrunerRecord | None) -> Iterable[str]:
    if record is not None and record.recipe is not None:
        recipe = json.dumps(record.recipe, indent=1, ensure_ascii=False)
        yield f"## Recipe\n\n```json\n{recipe}\n```"


def _pruning(record: PrunerRecord) -> str:
    config = record.config
    rest = {k: v for k, v in config.to_dict().items() if k not in ("method", "keep")}
    final = config.final_keep
    budget = "the method's own rule decides" if final is None else f"{final:g}"
    lines = [
        "## Pruning\n",
        "| | |\n|---|---|",
        f"| method | `{config.method}` |",
        f"| budget: `keep`, share of visual tokens averaged over the LLM's layers | {budget} |",
    ]
    if config.to_dict()["keep"] != final:
        lines.append(f"| `keep` in training | `{json.dumps(config.to_dict()['keep'])}` |")
    lines.append(f"| options | `{json.dumps(rest)}` |")
    return "\n".join(lines)


def _kept(record: PrunerRecord, kept: KeptShares | None) -> str:
    lines = ["## Kept tokens\n"]
    if kept is not None:
        low, middle, high = (f"{share:.3f}" for share in kept.quantiles)
        lines += [
            f"Share of the visual tokens that stays, averaged over layers, of {kept.samples} "
            f"samples ({kept.where}):\n",
            "| mean | 10 % | median | 90 % |\n|---|---|---|---|",
            f"| {kept.mean:.3f} | {low} | {middle} | {high} |",
        ]
    done = record.calibration
    lines.append(
        "\nNot calibrated: `keep` is not met on average."
        if done is None
        else f"\nCalibrated on {done.samples} samples, so that `keep` is met on average."
    )
    return "\n".join(lines)


def evaluation_table(history: Sequence[Mapping[str, Any]]) -> str:
    """The last evaluations of a trainer's `log_history` as Markdown; empty where there are none."""
    found: dict[int, dict[str, float]] = {}  # one evaluation may be logged in several entries
    for entry in history:
        numbers = {
            name: value
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(CLOCKS)
        }
        if numbers:
            row = found.setdefault(int(entry["step"]), {})
            row |= {name: entry[name] for name in FIRST if name in entry} | numbers
    rows = list(found.values())[-ROWS:]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        return ""
    lines = [names, ["---"] * len(names)]
    lines += [[f"{row[name]:.4g}" if name in row else "" for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(record: PrunerRecord | None, adapter: bool, trained: bool) -> str:
    lines = ["## Use\n", "```python", "from itprune import load_pretrained\n"]
    lines += [
        'loaded = load_pretrained("FOLDER")  # model, processor and pruner',
        'dense = load_pretrained("FOLDER", keep=1.0)' if record is not None else "",
        "```\n",
    ]
    if adapter:
        dense = (
            "Plain transformers loads it, without pruning, after "
            "`itprune merge --model FOLDER --output MERGED`"
        )
    else:
        dense = (
            "Plain transformers loads it, without pruning, with "
            '`AutoModelForImageTextToText.from_pretrained("FOLDER")`'
        )
    if trained:
        dense += f"; this method has trained parts (`{PRUNER_WEIGHTS}`), which are lost then"
    return "\n".join(line for line in lines if line) + f"\n{dense}."
