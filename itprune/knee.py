"""Inflection rules: where a long-tailed score curve bends tells how many tokens a sample keeps.

Each rule turns the scores of one group (an image at stage 1, a sample's visual tokens at stage 2)
into a count. The published abstract of arXiv 2409.01162 fixes neither formula nor threshold, so
the rules here are ours, each a named switch:

| rule | count |
|---|---|
| mean | scores above their mean: the point of the cumulative curve farthest from its chord |
| chord | the point of the sorted curve farthest from its own chord (Kneedle) |
| iqr | scores above Q3 + 1.5 IQR |
| derivative | up to the steepest fall of the smoothed sorted curve |
| topk | no inflection: a fixed count, for control experiments |

All rules are invariant to permutation and to positive scaling. Legend: N values, G groups, M the
largest group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.options import check_choice
from itprune.ragged import pad_groups

FLAT = 1e-6
"""A curve whose range is below this fraction of its largest magnitude has no bend."""


def _above_mean(curve: Tensor, filled: Tensor, size: Tensor) -> Tensor:
    mean = (curve * filled).sum(1) / size
    return ((curve > mean[:, None]) & filled).sum(1)


def _chord(curve: Tensor, filled: Tensor, size: Tensor) -> Tensor:
    last = (size - 1).clamp(min=1)
    high, low = curve[:, :1], curve.gather(1, (size - 1)[:, None])
    x = torch.arange(curve.shape[1], device=curve.device) / last[:, None]
    y = (curve - low) / (high - low)
    below = (1 - x - y).masked_fill(~filled, -torch.inf)
    return below.argmax(1)


def _outliers(curve: Tensor, filled: Tensor, size: Tensor) -> Tensor:
    q3, q1 = _quantile(curve, size, 0.75), _quantile(curve, size, 0.25)
    return ((curve > (q3 + 1.5 * (q3 - q1))[:, None]) & filled).sum(1)


def _quantile(curve: Tensor, size: Tensor, q: float) -> Tensor:
    """Linear-interpolation quantile of each descending row's first `size` values."""
    place = (1 - q) * (size - 1)
    below = place.floor().long()
    above = place.ceil().long()
    low, high = curve.gather(1, below[:, None])[:, 0], curve.gather(1, above[:, None])[:, 0]
    return low + (high - low) * (place - below)


def _steepest(curve: Tensor, filled: Tensor, size: Tensor, window: int | None = None) -> Tensor:
    """The window is M/16 values, odd, unless named: without smoothing the first gap always wins."""
    if curve.shape[1] < 2:
        return size
    width = window or max(3, curve.shape[1] // 16) | 1
    edge = width // 2
    padded = F.pad(curve[:, None], (edge, edge), mode="replicate")
    smooth = F.avg_pool1d(padded, width, stride=1)[:, 0]
    fall = smooth[:, :-1] - smooth[:, 1:]
    inside = torch.arange(fall.shape[1], device=curve.device) < (size - 1)[:, None]
    return fall.masked_fill(~inside, -torch.inf).argmax(1) + 1


RULES: dict[str, Callable[..., Tensor]] = {
    "mean": _above_mean,
    "chord": _chord,
    "iqr": _outliers,
    "derivative": _steepest,
}
RULE_NAMES = (*RULES, "topk")


def inflection_count(
    score: Tensor, group: Tensor, groups: int, rule: str, window: int | None = None
) -> Tensor:
    """How many values of each group lie before its curve's inflection point.

    Args:
        score: (N,) any float dtype; higher = keep.
        group: (N,) ascending group ids.
        groups: number of groups G.
        rule: a key of `RULES`.
        window: smoothing window of `derivative`, odd.

    Returns:
        (G,) int64, at least 1 for a non-empty group. A constant or non-finite curve keeps all.

    Raises:
        ValueError: an unknown rule.
    """
    check_choice("rule", rule, RULES)
    if len(score) == 0:
        return torch.zeros(groups, dtype=torch.long, device=score.device)
    finite = torch.isfinite(score)
    values = torch.where(finite, score.double(), 0.0)
    table, filled = pad_groups(values, group, groups, -torch.inf)
    curve = torch.sort(table, dim=1, descending=True).values
    size = filled.sum(1)
    some = size.clamp(min=1)
    low = curve.gather(1, (some - 1)[:, None])[:, 0]
    # Pads repeat the row's lowest value: a smoothing window that reaches over the end stays finite.
    curve = torch.where(filled, curve, low[:, None])
    curve = torch.where(size[:, None] > 0, curve, 0.0)
    bent = curve[:, 0] - curve[:, -1] > FLAT * curve.abs().amax(1)
    broken = torch.zeros(groups, dtype=torch.long, device=score.device)
    broken = broken.index_add(0, group, (~finite).long()) > 0
    usable = bent & ~broken
    if not bool((usable | (size <= 1)).all()):
        # Python shows a warning once for each place that raises it.
        warnings.warn(
            "a score curve is constant or not finite: all its tokens are kept", stacklevel=2
        )
    count = RULES[rule](curve, filled, some, *([window] if rule == "derivative" else []))
    return torch.where(usable, count.clamp(min=1), size)
