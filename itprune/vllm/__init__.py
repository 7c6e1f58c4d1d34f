"""A plug-in for vLLM's servers: models that take a different number of image rows in each request.

vLLM calls what stands under the entry-point group `vllm.general_plugins` in each of its processes;
pyproject.toml names `register` there. It adds architectures under names of their own and replaces
none, so whoever does not ask for one of them gets vLLM's own classes:

    vllm serve FOLDER --enable-mm-embeds \\
        --hf-overrides '{"architectures": ["ItpruneLlavaForConditionalGeneration"]}'

vLLM's own classes stack the rows of all images of one step into one tensor, and requests whose
images kept different numbers of rows, seen in the same step, end the engine.
"""

from __future__ import annotations

PREFIX = "Itprune"
RAGGED = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""Model type -> the architecture in its config.json, of families whose rows vLLM takes."""


def architecture(model_type: str) -> str | None:
    """What to put into --hf-overrides for a model type; None: vLLM takes no rows of this family."""
    name = RAGGED.get(model_type)
    return None if name is None else PREFIX + name


def register() -> None:
    """Tells vLLM of the architectures; their modules are imported when one is asked for.

    May be called again in the same process.
    """
    from vllm import ModelRegistry

    for name in RAGGED.values():
        ModelRegistry.register_model(PREFIX + name, f"itprune.vllm.models:{PREFIX}{name}")
