"""Supervised positions of a batch and the logits there, whatever shape the model made of them.

Shapes: B samples, S length, M supervised positions of the batch in row-major order, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts a supervised token, and all that is predicted.

    Args:
        labels: (B, S), -100 where nothing is learnt.

    Returns:
        (B, S) bool with M ones, and (B, S) the next position's label.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    return targets != IGNORE, targets


def rows_of(logits: Tensor, mask: Tensor) -> Tensor:
    """(M, V) of (B, S, V) logits, or of those that are (M, V) already."""
    return logits if logits.ndim == 2 else logits[mask]
