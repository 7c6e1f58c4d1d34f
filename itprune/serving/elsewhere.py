"""What of a model and its pruner can work here while the language model runs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from itprune.checkpoint import Loaded
from itprune.config import PruneConfig
from itprune.dressing import Dress
from itprune.families.base import Family, PatchFamily
from itprune.methods import build_method, method_class
from itprune.methods.combined import SEPARATOR
from itprune.trained import is_trained

IDLE = "dense"
"""The method that has no place because it does nothing."""
FAMILIES = {
    "llava": True,
    "llava_next": True,
    "llava_onevision": True,
    "internvl": True,
    "idefics3": False,
    "smolvlm": False,
}
"""Model types whose language model needs nothing but rows, and whether all of an image's stand
together, so that they can also be handed over image by image."""
WHY_NOT = {
    "qwen2_vl": "its positions need the image's grid",
    "qwen2_5_vl": "its positions need the image's grid",
    "qwen3_vl": "its layers add features of the vision encoder, and its positions need the grid",
    "gemma3": "its image tokens see each other in both directions",
    "paligemma": "its prompt is read in both directions",
}


def before_llm(dress: Dress, family: Family) -> Dress:
    """A pruner without what it does inside the language model.

    Raises:
        ValueError: nothing would be left of it, or it needs the language model.
    """
    name, options = dress.config.method, dict(dress.config.options)
    if SEPARATOR not in name and _has_stage2(name):
        options["stage2"] = None
    method = build_method(name, options, family.host)
    if {"layers", "compute"} & set(method.places) or not (method.places or name == IDLE):
        raise ValueError(
            f"method {name!r} works inside the language model, which runs elsewhere; choose one "
            "that works before it, such as itprune"
        )
    if method.needs_question:
        raise ValueError(
            f"method {name!r} reads the question with the language model, which runs elsewhere; "
            "choose one that looks at images alone, such as itprune"
        )
    if method.needs_patches and not isinstance(family, PatchFamily):
        raise ValueError(
            f"method {name!r} reads patches one by one, and in this model a visual token is not "
            "one of them; choose another"
        )
    if is_trained(method) and not dress.weights:
        raise ValueError(f"method {name!r} has trained parts, and this checkpoint has none")
    return replace(dress, config=dress.config.replace(options=options, positions=None))


def _has_stage2(name: str) -> bool:
    return "stage2" in {field.name for field in fields(method_class(name).Options)}


def check_family(model_type: str) -> bool:
    """Whether an image's rows stand together.

    Raises:
        ValueError: the family cannot be served from rows alone.
    """
    if model_type not in FAMILIES:
        reason = WHY_NOT.get(model_type, "nobody has verified it")
        raise ValueError(
            f"{model_type} cannot be answered elsewhere from embeddings alone: {reason}; serve it "
            f"with `itprune serve` itself (this works for {', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type]


def own_dress(loaded: Loaded, same_count: int | None, family: Family) -> Dress:
    """The checkpoint's pruner, or one with a fixed count; without any, the usual one.

    Raises:
        ValueError: the count cannot be the same for all images.
    """
    attached = loaded.attached
    own = Dress(PruneConfig()) if attached is None else Dress.of(attached)
    if same_count is None:
        return own
    if not isinstance(family, PatchFamily):
        raise ValueError(
            "same_count: images of this model come in several sizes, with marks between their "
            "rows, so they cannot all have one count"
        )
    rows, columns = family.host.grid
    if not 2 <= same_count <= rows * columns:
        raise ValueError(
            f"same_count: must be from 2 to the {rows * columns} tokens an image has, "
            f"got {same_count}"
        )
    stage1: Mapping[str, Any] = {}
    if own.config.method == "itprune":
        stage1 = {k: v for k, v in (own.config.options.get("stage1") or {}).items() if k == "score"}
    options = {"stage1": {**stage1, "rule": "topk", "keep": same_count}, "stage2": None}
    return Dress(PruneConfig("itprune", keep=None, options=options))
