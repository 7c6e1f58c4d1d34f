"""Square tiles: what encoders need that find a tile's shape from its number of patches.

InternVL, Idefics3 and SmolVLM take the square root of the patch count before they merge patches,
so tiles of another shape would be torn apart without an error.
"""

from __future__ import annotations

from torch import Tensor


def square_side(pixels: Tensor, patch: tuple[int, int], merge: int) -> int:
    """Patches on the side of a square tile.

    Args:
        pixels: (…, height, width).
        patch: height and width of a patch.
        merge: `merge` x `merge` patches make one token.

    Raises:
        ValueError: tiles that are not square, or no multiple of the merge.
    """
    height, width = pixels.shape[-2:]
    rows, columns = height // patch[0], width // patch[1]
    if rows != columns or rows < merge or rows % merge:
        raise ValueError(
            f"pixel_values: tiles of {height} x {width} pixels make {rows} x {columns} patches, "
            f"but this model needs square tiles whose side is a multiple of {merge} patches; let "
            "the model's processor make them"
        )
    return rows
