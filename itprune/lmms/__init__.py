"""lmms-eval asks our checkpoints: the model `itprune` in its registry.

lmms-eval looks for models under the entry-point group `lmms_eval.models`; pyproject.toml names
`manifest` there, so that installing both packages is all it takes. Every one of its commands loads
this module, which is why the model itself stands in another.
"""

from __future__ import annotations

from typing import Any

MODEL = "itprune"
"""What `lmms-eval --model` takes."""


def manifest() -> Any:
    """What lmms-eval's registry wants to know.

    Returns:
        Its ModelManifest. There is a `simple` class only: lmms-eval prefers a `chat` class where
        there is one, and has no multiple choice by likelihood for it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path="itprune.lmms.model.Itprune")
