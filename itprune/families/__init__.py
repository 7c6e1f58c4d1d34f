"""Registry of families. A new architecture is one file with one `@register_family("model_type")`.

`model_type` is what transformers writes into config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from itprune.families.base import Family
from itprune.plugins import load_plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REGISTRY: dict[str, type[Family]] = {}


def register_family(model_type: str) -> Callable[[type[Family]], type[Family]]:
    """Registers a `Family` subclass; works from outside the package.

    Raises:
        ValueError: the model type is taken.
    """

    def register(cls: type[Family]) -> type[Family]:
        if model_type in _REGISTRY:
            raise ValueError(f"family {model_type!r} is already taken by {_REGISTRY[model_type]!r}")
        _REGISTRY[model_type] = cls
        return cls

    return register


def families() -> tuple[str, ...]:
    """Model types we can attach to, those of installed packages included."""
    load_plugins("itprune.families", "family")
    return tuple(sorted(_REGISTRY))


def family_class(model_type: str) -> type[Family]:
    """A family's class.

    Raises:
        ValueError: an architecture we do not know.
    """
    if model_type not in families():
        raise ValueError(
            f"model family {model_type!r} is not supported; supported: {', '.join(families())}. "
            "docs/add-a-family.md shows how to add one in your own code"
        )
    return _REGISTRY[model_type]


def find_family(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises:
        ValueError: an architecture we do not know, or a model without its language-model head.
    """
    family = family_class(model.config.model_type)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, and token pruning works around "
            "it; load the model with AutoModelForImageTextToText"
        )
    return family(model)


# Importing a family's file registers it.
from itprune.families import (  # noqa: E402, F401
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
