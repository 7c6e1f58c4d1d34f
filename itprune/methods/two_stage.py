"""`itprune`: our two-stage method (after arXiv 2409.01162, whose formulas are not public).

Stage 1 keeps of each image as many tokens as its patch-to-CLS curve has before the bend; stage 2
drops, after an LLM layer, visual tokens the instruction pays little attention to and, in long
instructions, text that falls below the same threshold.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from itprune.calibration import Calibration, Recorder, merge_budgets
from itprune.knee import RULE_NAMES, inflection_count
from itprune.methods import register_method
from itprune.methods.base import Card, Host, Method, Trial
from itprune.methods.budget import split_keep
from itprune.options import check_choice, check_fraction
from itprune.ragged import group_min, group_sizes, top_per_group
from itprune.tokens import SCORES, Images, Kept, LayerTokens


@dataclass(frozen=True)
class Stage1:
    """Options of the stage before the LLM."""

    rule: str = "mean"
    """Inflection rule that sets each image's count."""
    score: str = "attention"
    """attention: CLS row, mean over heads; cosine: CLS and patch states; full_width: one head."""
    keep: float | int | None = None
    """Average fraction after this stage; a whole number above 1: that many tokens (rule topk);
    null: derived from prune.keep."""
    min_keep: int = 1
    """Fewest tokens an image keeps."""
    max_keep: int | None = None
    """Most tokens an image keeps."""
    window: int | None = None
    """Smoothing window of the rule `derivative`, odd."""
    merge_rest: bool = False
    """Add one attention-weighted mean of the dropped tokens."""

    def __post_init__(self) -> None:
        check_choice("prune.stage1.rule", self.rule, RULE_NAMES)
        check_choice("prune.stage1.score", self.score, SCORES)
        _check_keep("prune.stage1.keep", self.keep, self.rule)
        if self.min_keep < 1 or (self.max_keep is not None and self.max_keep < self.min_keep):
            raise ValueError(
                f"prune.stage1: needs 1 <= min_keep <= max_keep, got {self.min_keep} and "
                f"{self.max_keep}"
            )
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"prune.stage1.window: must be odd and positive, got {self.window}")


@dataclass(frozen=True)
class Stage2:
    """Options of the stage inside the LLM."""

    layers: tuple[int, ...] | None = None
    """0-based layers whose attention decides; all later layers run without what is dropped. null:
    one layer, at a third of the depth."""
    rule: str = "mean"
    """Inflection rule on each sample's visual tokens."""
    keep: float | None = None
    """Average fraction of the visual tokens after the last stage; null: derived from prune.keep."""
    min_keep: int = 1
    """Fewest visual tokens a sample keeps."""
    rope: bool = False
    """Score with the rotary phase. Off: such scores favour the bottom of the image (2412.13180)."""
    text: bool = True
    """Drop instruction text below the visual threshold, too."""
    min_text: int = 25
    """Shortest instruction, in droppable text tokens, whose text may be dropped."""

    def __post_init__(self) -> None:
        check_choice("prune.stage2.rule", self.rule, RULE_NAMES)
        check_fraction("prune.stage2.keep", self.keep)
        layers = self.layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"prune.stage2.layers: must be ascending layer numbers, got {list(layers)}"
            )
        if self.min_keep < 0 or self.min_text < 0:
            raise ValueError("prune.stage2: min_keep and min_text must not be negative")


@dataclass(frozen=True)
class TwoStageOptions:
    """Options of `itprune`; `null` switches a stage off."""

    stage1: Stage1 | None = field(default_factory=Stage1)
    stage2: Stage2 | None = field(default_factory=Stage2)


@register_method("itprune")
class TwoStage(Method):
    """Inflection point of the vision encoder's curve, then of the instruction's."""

    Options = TwoStageOptions
    card = Card(
        "inflection of the CLS-attention curve, then of the instruction's attention",
        paper="2409.01162",
        count="dynamic",
        training="optional",
        needs=("cls",),
        notes="The abstract fixes the two stages; the rules and thresholds are ours, each a named "
        "switch. Without CLS: mean attention received.",
    )
    places: tuple[str, ...] = ("before_llm", "layers")

    def __init__(self, options: TwoStageOptions, host: Host) -> None:
        super().__init__(options, host)
        self.stage1, self.stage2 = options.stage1, options.stage2
        self._layers = self._resolve_layers()
        acts = {"before_llm": self.stage1 is not None, "layers": self.stage2 is not None}
        self.places = tuple(place for place in acts if acts[place])

    def _resolve_layers(self) -> tuple[int, ...]:
        if self.stage2 is None:
            return ()
        layers = self.stage2.layers or (self.depth // 3,)
        if layers[0] < 0 or layers[-1] >= self.depth - 1:
            raise ValueError(
                f"prune.stage2.layers: {list(layers)} must lie in 0..{self.depth - 2}, since the "
                f"model has {self.depth} LLM layers and a later one must be left to run faster"
            )
        return layers

    @property
    def idle(self) -> bool:
        nothing_configured = self.stage1 is None and self.stage2 is None
        return nothing_configured or super().idle

    def layers(self) -> tuple[int, ...]:
        return self._layers

    def shares(self) -> tuple[float, ...] | None:
        stages = ("stage1", *(f"stage2.{k}" for k in self._layers))
        targets = [self._target(stage) for stage in stages]
        if any(target is None or isinstance(target, int) for target in targets):
            return None
        return tuple(accumulate((float(t) for t in targets if t is not None), mul))

    @property
    def calibrates(self) -> bool:
        return bool(self._stages())

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Stage by stage in the order they act, each while the earlier ones meet their target; what
        later ones see depends on it, so they are measured at every target there is."""
        stages = self._stages()
        before, self.calibration = self.calibration, None
        found: dict[float | None, Calibration] = {}
        try:
            for keep in trial.budgets:
                self.share(keep)
                for _ in stages[1:] if found and stages[0] == "stage1" else stages:
                    self.recorder = Recorder()
                    trial.run()
                    self.calibration = self.recorder.finish()
                if self.calibration is None or not set(stages) <= set(self.calibration.curves):
                    raise ValueError("calibration needs samples with images, and found none")
                found[keep] = self.calibration
        except BaseException:
            self.calibration = before
            raise
        finally:
            self.recorder = None
        return merge_budgets(found)

    def _stages(self) -> tuple[str, ...]:
        """Names of the stages whose counts a calibration scales, in the order they act."""
        first = ("stage1",) if self.stage1 is not None and self.stage1.rule != "topk" else ()
        later = self._layers if self.stage2 is not None and self.stage2.rule != "topk" else ()
        return (*first, *(f"stage2.{k}" for k in later))

    # ------------------------------------------------------------------------------- stage 1
    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        if self.stage1 is None:
            return super().before_llm(images)
        score = images.salience(self.stage1.score)
        image, total = images.image, images.lens
        count = self._count(score, image, total, "stage1", self.stage1.rule, self.stage1.window)
        count = count.clamp(min=self.stage1.min_keep, max=self.stage1.max_keep).minimum(total)
        keep = top_per_group(score, image, count)
        if not self.stage1.merge_rest:
            return Kept(keep)
        return _merge_rest(images, score, keep)

    # ------------------------------------------------------------------------------- stage 2
    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Kept:
        assert self.stage2 is not None
        score = tokens.relevance(self.stage2.rope)
        visual, sample = tokens.visual, tokens.sample
        alive = group_sizes(sample[visual], tokens.samples)
        name = f"stage2.{tokens.layer}"
        count = self._count(score[visual], sample[visual], alive, name, self.stage2.rule, None)
        count = count.clamp(min=self.stage2.min_keep).minimum(alive)
        keep = torch.ones_like(visual)
        keep[visual] = top_per_group(score[visual], sample[visual], count)
        if self.stage2.text:
            keep &= ~self._idle_text(tokens, score, keep)
        return Kept(keep)

    def _idle_text(self, tokens: LayerTokens, score: Tensor, keep: Tensor) -> Tensor:
        """Droppable instruction text less relevant than the least relevant visual token kept."""
        assert self.stage2 is not None
        kept_visual = tokens.visual & keep
        threshold = group_min(score[kept_visual], tokens.sample[kept_visual], tokens.samples)
        threshold = torch.where(threshold.isfinite(), threshold, -torch.inf)
        long = tokens.instruction_lens >= self.stage2.min_text
        below = score < threshold[tokens.sample]
        return tokens.droppable_text & long[tokens.sample] & below

    # ------------------------------------------------------------------------------- counts
    def _count(
        self, score: Tensor, group: Tensor, total: Tensor, stage: str, rule: str, window: int | None
    ) -> Tensor:
        """(G,) how many tokens of each group stay: the rule's count, scaled to the target."""
        target = self._target(stage)
        if rule == "topk":
            if target is None:
                raise ValueError(f"prune.{stage}: the rule topk needs a keep value")
            fixed = target if isinstance(target, int) else (total * target).round()
            return torch.as_tensor(fixed, device=total.device).long().expand_as(total)
        raw = inflection_count(score, group, len(total), rule, window)
        if self.recorder is not None:
            self.recorder.add(stage, rule, raw, total)
        if target is None:
            return raw
        scale = self.calibration.scale(stage, rule, target, self.keep) if self.calibration else None
        if scale is None:
            if self.recorder is None:
                warnings.warn(
                    f"keep={self.keep} is set but {stage} is not calibrated, so the rule {rule!r} "
                    "alone decides; run `itprune calibrate` (training does it by itself)",
                    stacklevel=2,
                )
            return raw
        return (raw * scale + 0.5).floor().long()

    def _target(self, stage: str) -> float | int | None:
        """Wanted share of the tokens a stage chooses from; None: the rule decides."""
        index = 0 if stage == "stage1" else 1 + self._layers.index(int(stage.split(".")[1]))
        fixed: list[Any] = [1.0 if self.stage1 is None else self.stage1.keep]
        if self._layers:
            assert self.stage2 is not None
            fixed += [None] * (len(self._layers) - 1) + [self.stage2.keep]
        if isinstance(fixed[0], int) and not isinstance(fixed[0], bool) and fixed[0] > 1:
            if index == 0:
                return int(fixed[0])
            return None if fixed[index] is None else float(fixed[index])
        if self.keep is None:
            return None if fixed[index] is None else self._relative(fixed, index)
        shares = split_keep(self.keep, self.depth, self._layers, tuple(fixed))
        return shares[index] / (shares[index - 1] if index else 1.0)

    @staticmethod
    def _relative(fixed: list[Any], index: int) -> float:
        """A named fraction of all visual tokens as a share of what the stage before left."""
        before = [f for f in fixed[:index] if f is not None]
        return min(1.0, float(fixed[index]) / (float(before[-1]) if before else 1.0))


def _merge_rest(images: Images, score: Tensor, keep: Tensor) -> Kept:
    """Fills each image's best dropped slot with the score-weighted mean of all dropped tokens."""
    groups, image = len(images.lens), images.image
    weight = torch.where(keep, 0.0, score.clamp(min=0)).to(images.features.dtype)
    total = torch.zeros(groups, dtype=weight.dtype, device=weight.device)
    total = total.index_add(0, image, weight).clamp(min=math.ulp(1.0))
    mean = torch.zeros(groups, images.features.shape[1], dtype=weight.dtype, device=weight.device)
    mean = mean.index_add(0, image, images.features * weight[:, None]) / total[:, None]
    dropped = images.lens - group_sizes(image[keep], groups)
    best = top_per_group(score.masked_fill(keep, -torch.inf), image, dropped.clamp(max=1))
    best &= ~keep
    features = torch.where(best[:, None], mean[image], images.features)
    return Kept(keep | best, features)


def _check_keep(where: str, keep: float | int | None, rule: str) -> None:
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 1:
        if rule != "topk":
            raise ValueError(f"{where}: a number of tokens ({keep}) needs rule: topk, not {rule!r}")
        return
    check_fraction(where, keep)
