"""vLLM's model classes, with image rows taken as they come; read by vLLM's registry alone.

Changes to each: rows made elsewhere (`image_embeds`) are handed on image by image, whatever their
number, in place of being stacked into one tensor. Pixels, weights, prompts and everything else are
vLLM's own. The frontend has checked by then that rows are as wide as the language model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration


class TakesRows:
    """Goes before a vLLM model class."""

    def embed_multimodal(self, **inputs: Any) -> Any:
        """What stands at the image places of the prompts of one step.

        Args:
            inputs: what vLLM's processor made. `image_embeds`: (n, R, W), or n tensors (R_i, W) or
                (1, R_i, W) where images have different numbers of rows.

        Returns:
            (R_i, W) for each image.
        """
        rows = inputs.get("image_embeds")
        if rows is None:
            return super().embed_multimodal(**inputs)  # type: ignore[misc]
        return tuple(_flat(image) for image in rows)


def _flat(image: Tensor) -> Tensor:
    return image.reshape(-1, image.shape[-1])


class ItpruneLlavaForConditionalGeneration(TakesRows, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class ItpruneLlavaNextForConditionalGeneration(TakesRows, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class ItpruneLlavaOnevisionForConditionalGeneration(
    TakesRows, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision."""


class ItpruneInternVLForConditionalGeneration(TakesRows, InternS1ForConditionalGeneration):
    """InternVL's "-hf" form, which vLLM runs with the class of InternS1."""
