"""Patches: the way through a pointwise projector, where visual tokens are the encoder's patches.

The method acts on vision features, and only those it keeps are projected.
Legend: n images, P features and S slots of each, D vision width, W LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from itprune.engine.attention import KEYWORD, AttentionCall
from itprune.engine.encoder import Asker, EncoderHooks, EncoderPass, pixels_of
from itprune.families.base import PatchFamily
from itprune.tokens import Block, Images

Projector = Callable[[Tensor], Tensor]


@dataclass
class PatchPass(EncoderPass):
    """One run of the tower and the projector behind it."""

    family: PatchFamily = field(kw_only=True)
    pixels: Tensor = field(kw_only=True)
    """(n, …) as the caller gave them."""
    shown: Tensor | None = None
    """(n, …) what the tower sees, where the method shrinks the image."""
    tokens: Tensor | None = None
    """(S, D) injected into the tower."""
    blocks: dict[int, Block] = field(default_factory=dict)
    tapped: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    kept: Tensor | None = None
    """(K,) flat slot of the features that were projected; None: all."""
    slots: torch.Size = field(default_factory=torch.Size)
    """n and the slots of each image."""
    waiting: Tensor | None = None
    """(n, P + extra, D) features of a pass that has to wait for the question."""

    # ------------------------------------------------------------------------ tower
    def tower_kwargs(self) -> dict[str, Any]:
        """What changes in the tower's call: shrunk pixels, injected tokens."""
        changes: dict[str, Any] = {}
        before = self.family.grid(self.pixels)
        after = self.asker.method.grid(*before)
        if after != before:
            changes = self.family.resize(self.pixels, after)
            self.shown = changes["pixel_values"]
        self.tokens = self.asker.method.tower_tokens()
        if self.tokens is not None:  # travels with the call, so recomputed blocks see it, too
            changes[KEYWORD] = AttentionCall(isolated=len(self.tokens))
        return changes

    def inject(self, embedded: Tensor) -> Tensor:
        """(n, T, D) -> (n, T + S, D)."""
        if self.tokens is None:
            return embedded
        tokens = self.tokens.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded, tokens], 1)

    def tap_kwargs(self, block: int) -> dict[str, Any]:
        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            if self.open:  # deaf to a recomputation after the pass
                self.tapped[block] = (query, key, scale)

        isolated = 0 if self.tokens is None else len(self.tokens)
        return {KEYWORD: AttentionCall(tap=tap, isolated=isolated)}

    def block_output(self, block: int, output: Any) -> None:
        hidden = self.every_row((output[0] if isinstance(output, tuple) else output).detach())
        query, key, scale = self.tapped.pop(block)
        query, key = self.every_row(query), self.every_row(key)
        own = hidden.shape[1] - (0 if self.tokens is None else len(self.tokens))
        self.blocks[block] = Block(query[:, :, :own], key[:, :, :own], scale, hidden[:, :own])

    # ------------------------------------------------------------------------ projector
    def shorten(self, features: Tensor, project: Projector) -> Tensor:
        """(n, P + extra, D) features -> the (1, K, D) that go through the projector."""
        self.open = False
        if self.waits:
            self.waiting = features
            return features if self.tokens is None else features[:, : -len(self.tokens)]
        images = self._images(features, project)
        slots = int(images.slots.sum())
        self.slots = torch.Size((len(images.lens), slots // max(len(images.lens), 1)))
        kept = self.choose(images, self.protected(slots))
        self.blocks = {}
        same = bool(kept.keep.all()) and kept.features is None
        if same and self.tokens is None and self.shown is None:
            return features
        self.kept = kept.keep.nonzero()[:, 0]
        flat = images.features if kept.features is None else kept.features
        return flat[self.kept][None]

    def restore(self, projected: Tensor) -> Tensor:
        """(1, K, W) projected features -> (n, S, W) with zeros in dropped slots."""
        if self.kept is None:
            return projected
        flat = projected[0]
        out = flat.new_zeros(self.slots.numel(), flat.shape[-1])
        return out.index_copy(0, self.kept, flat).view(*self.slots, -1)

    def late_features(self) -> Tensor:
        assert self.waiting is not None
        project = self.family.projector
        return self.restore(project(self.shorten(self.waiting, project))).flatten(0, 1)

    def _images(self, features: Tensor, project: Projector) -> Images:
        extra = None
        if self.tokens is not None:
            features, extra = features.split(
                [features.shape[1] - len(self.tokens), len(self.tokens)], 1
            )
        self._check_block(features)
        count, length, _ = features.shape
        pixels = self.pixels if self.shown is None else self.shown
        rows, columns = self.family.grid(pixels)
        full = self.family.grid(self.pixels)
        slots = full[0] * full[1] + length - rows * columns  # CLS may be a visual token, too
        device, flat = features.device, features.flatten(0, 1)
        first = torch.arange(count, device=device) * slots
        sample = self.samples(first, count * slots)
        return Images(
            features=flat,
            lens=torch.full((count,), length, device=device),
            pixels=pixels,
            slots=torch.full((count,), slots, device=device),
            grid=torch.tensor([[rows, columns]], device=device).expand(count, 2),
            slot_grid=torch.tensor([full], device=device).expand(count, 2),
            sample=sample,
            feature_block=self.family.feature_block,
            has_cls=self.family.has_cls,
            block=self._block,
            projected=lambda: project(flat[None])[0],
            question=lambda: self.asked().states(sample),
            instruction=lambda: self.asked().embeddings(sample),
            extra=extra,
        )

    def _check_block(self, features: Tensor) -> None:
        """Raises ValueError: (n, P, D) features that the scored block did not make."""
        block = self.blocks.get(self.family.feature_block)
        if block is None:
            return
        made = block.hidden[:, -features.shape[1] :]
        given = features.detach()[..., -made.shape[-1] :]  # of several layers the last one counts
        if bool(((given != made) & (given == given)).any()):  # what is no number equals nothing
            raise ValueError(
                "vision_feature_layer of this call is not the layer of the model's config, whose "
                "block is scored; set it in the config before `attach`"
            )

    def _block(self, index: int) -> Block:
        if index not in self.blocks:
            raise ValueError(f"vision block {index} was not asked for in `vision_blocks`")
        return self.blocks[index]


class PatchHooks(EncoderHooks[PatchPass]):
    """Listens to the tower, and stands before and behind the projector."""

    def __init__(self, asker: Asker, family: PatchFamily) -> None:
        super().__init__(asker)
        self.family = family
        self._projector: nn.Module | None = None
        self._around_projector: list[RemovableHandle] = []

    def install(self) -> None:
        family = self.family
        self.handles += [
            family.tower.register_forward_pre_hook(self._open, with_kwargs=True),
            family.embeddings.register_forward_hook(self._after_embeddings),
        ]
        super().install()
        self._surround()

    def remove(self) -> None:
        super().remove()
        for handle in self._around_projector:
            handle.remove()
        self._around_projector.clear()
        self._projector = None

    def _surround(self) -> None:
        """Stands before and behind the projector there is: PEFT may put another in its place."""
        projector = self.family.projector
        if projector is self._projector:
            return
        for handle in self._around_projector:
            handle.remove()
        self._projector = projector
        self._around_projector = [
            projector.register_forward_pre_hook(self._before_projector, with_kwargs=True),
            projector.register_forward_hook(self._after_projector),
        ]

    def _open(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.current = None
        if not self.works:
            return None
        self._surround()
        self.current = PatchPass(
            self.asker,
            "image",
            self.asker.question("image"),
            family=self.family,
            pixels=pixels_of(args, kwargs),
        )
        changes = self.current.tower_kwargs()
        return (args[1:] if "pixel_values" in changes else args), {**kwargs, **changes}

    def _after_embeddings(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if self.current is None else self.current.inject(output)

    def _before_projector(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        vision = self.current
        if vision is None:
            return None
        with self.asker.quiet():
            short = vision.shorten(args[0], self.family.projector)
        return (short, *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        vision, self.current = self.current, None
        if vision is None:
            return None
        if vision.waiting is not None:
            vision.encoded = output.detach().flatten(0, 1)
            self.waiting[vision.kind] = vision
            return None
        return vision.restore(output)
