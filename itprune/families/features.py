"""Which block makes the features, where a model's config has `vision_feature_layer`."""

from __future__ import annotations


def feature_block(layer: int | list[int], blocks: int) -> int:
    """0-based index of the block whose output becomes the features.

    Args:
        layer: `vision_feature_layer`; of several, whose features are joined, the last one counts.
        blocks: of the encoder.

    Raises:
        ValueError: a layer that is no block's output.
    """
    layer = layer if isinstance(layer, int) else layer[-1]
    # hidden_states has one entry more than there are blocks: entry f is block f - 1's output.
    index = layer - 1 if layer > 0 else blocks + layer
    if layer == 0 or not 0 <= index < blocks:
        raise ValueError(
            f"vision_feature_layer {layer} of this model is not the output of one of its "
            f"{blocks} vision blocks, so there is no attention to score with"
        )
    return index


def check_layer(layer: int | list[int] | None, config: int | list[int], blocks: int) -> None:
    """Refuses a layer handed to one call that is not the config's, whose block is scored.

    Args:
        layer: `vision_feature_layer` of the call; None: the config's.
        config: `vision_feature_layer` of the config.
        blocks: of the encoder.

    Raises:
        ValueError: they name different blocks.
    """
    if layer is not None and feature_block(layer, blocks) != feature_block(config, blocks):
        raise ValueError(
            f"vision_feature_layer {layer} of this call is not the layer of the model's config, "
            "whose block is scored; set it in the config before `attach`"
        )
