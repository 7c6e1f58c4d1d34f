"""What the engine needs to know about a model architecture: where things are, never how to prune.

An adapter names modules of a stock transformers model. It owns no forward and imports no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Family(ABC):
    """One architecture. Instances are made for one model."""

    has_cls: bool
    """The vision encoder puts a class token first."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def text_model(self) -> PreTrainedModel:
        """The decoder that owns `layers`."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, self.text_model.layers)

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Placeholder ids in `input_ids`, one per visual token."""
        return (self.model.config.image_token_id,)

    @property
    @abstractmethod
    def tower(self) -> PreTrainedModel:
        """The vision encoder; called with the pixels of all images."""

    @property
    @abstractmethod
    def feature_block(self) -> nn.Module:
        """The encoder block whose output becomes the features; its attention gives the scores."""

    @property
    @abstractmethod
    def feature_attention(self) -> nn.Module:
        """The attention module of `feature_block`."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """A pointwise module from vision features (n, P, D) to LLM width: it may be handed any
        subset of the tokens."""

    @abstractmethod
    def blank_image(self) -> dict[str, Tensor]:
        """Keyword arguments of `get_image_features` for one blank image, for batches of text."""
