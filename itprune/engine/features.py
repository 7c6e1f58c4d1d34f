"""Features: the way of every other family, where visual tokens are what the host's
`get_image_features` and `get_video_features` return.

These two are wrapped on the model instance: behind them, dropped slots are zero. What the host does
in between (merging patches, arranging tiles, adding newlines) stays its own; the family's geometry
says which patches made which token.
Legend: S slots and V tokens of a call (S more than V where there are separators), W LLM width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from itprune.engine.attention import KEYWORD, AttentionCall
from itprune.engine.encoder import (
    Asker,
    EncoderHooks,
    EncoderPass,
    flat_features,
    like,
    pixels_of,
)
from itprune.families.base import TokenFamily
from itprune.geometry import Geometry
from itprune.ragged import group_sizes
from itprune.tokens import Block, Images


@dataclass
class TokenPass(EncoderPass):
    """One call that makes visual tokens."""

    family: TokenFamily = field(kw_only=True)
    arguments: dict[str, Any] = field(kw_only=True)
    """Of the call, by name."""
    whole: Geometry = field(kw_only=True)
    """Of the slots the caller's sequence has."""
    shown: Geometry = field(kw_only=True)
    """Of the tokens the call returns; `whole`, unless the pixels were shrunk."""
    pixels: Tensor | None = None
    """(R, …) what the encoder saw."""
    chunks: dict[int, list[Block]] = field(default_factory=dict)
    """What was heard of each block, call after call of its attention."""
    heard: dict[int, dict[str, Tensor | None]] = field(default_factory=dict)
    """Projections and mask of a block under way, where they are listened to one by one."""
    flat: Tensor | None = None
    """(S, W) features of a pass that has to wait for the question."""

    # ------------------------------------------------------------------------ encoder
    def tap_kwargs(self, block: int) -> dict[str, Any]:
        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            if self.open:
                query, key = self.every_row(query), self.every_row(key)
                chunk = Block(query, key, scale, query.new_empty(0))
                self.chunks.setdefault(block, []).append(chunk)

        return {KEYWORD: AttentionCall(tap=tap)}

    def note(self, block: int, name: str, value: Tensor | None) -> None:
        """Keeps one of: query, key (n, T, H d), mask (n, 1, T, T) of a block."""
        heard = None if value is None else self.every_row(value.detach())
        self.heard.setdefault(block, {})[name] = heard

    def block_output(self, block: int, output: Any) -> None:
        hidden = self.every_row((output[0] if isinstance(output, tuple) else output).detach())
        parts = self.heard.pop(block, None)
        if parts is not None:
            self.chunks[block] = [self._block_of(parts, hidden)]
        elif self.family.has_cls:
            (chunk,) = self.chunks[block]
            self.chunks[block] = [Block(chunk.query, chunk.key, chunk.scale, hidden)]

    def _block_of(self, parts: dict[str, Tensor | None], hidden: Tensor) -> Block:
        query, key, mask = parts["query"], parts["key"], parts.get("mask")
        assert query is not None
        assert key is not None
        heads = self.family.vision_shape[1]
        query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
        return Block(query, key, query.shape[-1] ** -0.5, hidden, seen_mask(mask))

    # ------------------------------------------------------------------------ the choice
    def reduce(self, pooled: Any) -> Any:
        """The features of a call, in the form they came in, with zeros in dropped slots."""
        self.open = False
        flat = flat_features(pooled)
        if self.waits:
            self.flat, self.encoded = flat, flat.detach()
            return pooled
        chosen = self._chosen(flat)
        if chosen is flat:
            return pooled
        if self.shown is self.whole:
            return like(pooled, chosen)
        lens = self.whole.lens
        if self.whole.clip is not None:
            lens = group_sizes(self.whole.clip.repeat_interleave(lens), len(pooled))
        return type(pooled)(chosen.split(lens.tolist()))

    def late_features(self) -> Tensor:
        assert self.flat is not None
        return self._chosen(self.flat)

    def _chosen(self, flat: Tensor) -> Tensor:
        """(S, W) -> (S of the whole, W); the very same tensor where nothing changes."""
        whole, shown = self.whole.to(flat.device), self.shown.to(flat.device)
        slots, total = whole.slots(), len(flat)
        if self.shown is not self.whole:
            total = len(slots)
        self._check(shown, flat)
        place = slots if whole.place is None else whole.place
        places = total if whole.places is None else whole.places
        images = self._images(flat[shown.slots()], shown, whole, place, places)
        protected = self.protected(places)
        kept = self.choose(images, None if protected is None else protected[place])
        self.chunks = {}
        if bool(kept.keep.all()) and kept.features is None:
            return flat
        features = images.features if kept.features is None else kept.features
        out = flat.new_zeros(total, flat.shape[1])
        out = out.index_copy(0, slots[kept.keep], features[kept.keep].to(flat.dtype))
        if whole.separator is None:
            return out
        stays = torch.zeros(total + 1, dtype=torch.bool, device=flat.device)
        stays[whole.separator[kept.keep]] = True  # -1, which is none, marks the place too many
        if protected is not None:  # what speaks after an image may be the newline behind it
            stays[:-1] |= protected
        stays[slots] = False
        separator = stays[:-1].nonzero()[:, 0]
        return out.index_copy(0, separator, flat[separator])

    def _check(self, shown: Geometry, flat: Tensor) -> None:
        tokens = int(shown.lens.sum())
        if tokens > len(flat) or (shown.slot is None and tokens != len(flat)):
            raise ValueError(
                f"the {self.kind} sizes given make {tokens} visual tokens, but the model made "
                f"{len(flat)}; pass the sizes its processor returned with the pixels"
            )

    def _images(
        self, tokens: Tensor, shown: Geometry, whole: Geometry, place: Tensor, places: int
    ) -> Images:
        """What the method is to see.

        Args:
            tokens: (V, W) what the call made.
            shown, whole: their geometry, and that of the caller's sequence.
            place: (tokens of the whole,) which placeholder each fills.
            places: how many of these there are.
        """
        assert self.pixels is not None
        # What makes pictures smaller does so frame by frame: a tall grid would mix frames.
        clip = self.asker.video == "clip" and "pixels" not in self.asker.method.places
        grouped, full = (g.by_clip() if clip else g for g in (shown, whole))
        sample = self.samples(place[full.lens.cumsum(0) - full.lens], places)
        return Images(
            features=tokens,
            lens=grouped.lens,
            pixels=self.pixels,
            slots=full.lens,
            grid=grouped.grid,
            slot_grid=full.grid,
            sample=sample,
            feature_block=self.family.feature_block,
            has_cls=self.family.has_cls,
            block=_no_block,
            projected=lambda: tokens,
            question=lambda: self.asked().states(sample),
            instruction=lambda: self.asked().embeddings(sample),
            source=grouped.source,
            scored=self._score,
        )

    @torch.no_grad()
    def _score(self, name: str, index: int) -> Tensor:
        """(V,)."""
        if index not in self.chunks:
            raise ValueError(f"vision block {index} was not asked for in `vision_blocks`")
        parts = [chunk.score(name, self.family.has_cls) for chunk in self.chunks[index]]
        return self.shown.pool(torch.cat([part.flatten() for part in parts]))


def _no_block(index: int) -> Block:
    raise ValueError(
        "this method reads the encoder's patches one by one, but in this model a visual token is "
        "made of several; choose a method that reads features and scores alone"
    )


def seen_mask(mask: Tensor | None) -> Tensor | None:
    """The mask an encoder's attention got, as bool, True = seen."""
    if mask is None or mask.ndim != 4:
        return None if mask is None else mask[:, None, None, :].bool()
    return mask if mask.dtype == torch.bool else mask == 0


class Wrapped:
    """Stands in for `get_image_features` or `get_video_features` of one model.

    An object rather than a closure, so that a copied model carries a copy; it shows the signature
    of what it wraps, by which `generate` knows what to hand over.
    """

    def __init__(self, hooks: TokenHooks, kind: str, call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, call)
        self._hooks, self._kind, self._call = hooks, kind, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks.encode(self._kind, self._call, args, kwargs)


class TokenHooks(EncoderHooks[TokenPass]):
    """Listens to the tower, and stands behind the calls that make visual tokens."""

    def __init__(self, asker: Asker, family: TokenFamily) -> None:
        super().__init__(asker)
        self.family = family
        self._wrapped: dict[str, Any] = {}
        """Name -> what the instance itself had under it; None: nothing, the class's own."""
        self._projections: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._listening: dict[int, list[RemovableHandle]] = {}

    def install(self) -> None:
        family, base = self.family, self.family.model.base_model
        for kind in family.placeholders:
            name = f"get_{kind}_features"
            self._wrapped[name] = base.__dict__.get(name)
            base.__dict__[name] = Wrapped(self, kind, getattr(base, name))
        self.handles.append(
            family.tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        )
        self._listen()
        super().install()

    def remove(self) -> None:
        super().remove()
        for handle in (h for handles in self._listening.values() for h in handles):
            handle.remove()
        self._listening.clear()
        self._projections.clear()
        own = self.family.model.base_model.__dict__
        for name, before in self._wrapped.items():
            if before is None:
                del own[name]
            else:
                own[name] = before
        self._wrapped.clear()

    def _listen(self) -> None:
        """Stands behind the projections there are: adapters put on, or merged, replace modules."""
        for index, block in enumerate(self.family.blocks):
            projections = self.family.query_key(block)
            if projections is None or projections == self._projections.get(index):
                continue
            for handle in self._listening.get(index, ()):
                handle.remove()
            self._projections[index] = projections
            self._listening[index] = [
                module.register_forward_hook(functools.partial(self._after_projection, index, name))
                for name, module in zip(("query", "key"), projections, strict=True)
            ]

    def _before_tower(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.current is not None:
            self.current.pixels = pixels_of(args, kwargs)

    def _after_projection(
        self, index: int, name: str, module: nn.Module, args: Any, output: Tensor
    ) -> None:
        if self.current is not None and self.current.wants(index):
            self.current.note(index, name, output)

    def _before_attention(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.family.query_key(self.family.blocks[index]) is None:
            return super()._before_attention(index, module, args, kwargs)
        if self.current is not None and self.current.wants(index):
            self.current.note(index, "mask", kwargs.get("attention_mask"))
        return None

    # ------------------------------------------------------------------------ the call
    def encode(
        self, kind: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Makes the call and takes what the method drops out of its output."""
        if self.current is not None or not self.works:  # a call inside another is part of it
            return call(*args, **kwargs)
        self._listen()
        arguments = _named(call, args, kwargs)
        named = arguments.pop("return_dict", self.family.model.base_model.config.return_dict)
        self.current = vision = self._pass(kind, arguments)
        try:
            output = call(**vision.arguments, return_dict=True)
        finally:
            self.current = None
        with self.asker.quiet():
            output.pooler_output = vision.reduce(output.pooler_output)
        if vision.flat is not None:
            self.waiting[kind] = vision
        return output if named in (True, None) else output.to_tuple()

    def _pass(self, kind: str, arguments: dict[str, Any]) -> TokenPass:
        whole = shown = self.family.geometry(kind, arguments)
        grids = [(int(rows), int(columns)) for rows, columns in whole.grid.tolist()]
        wanted = [self.asker.method.grid(*grid) for grid in grids]
        if wanted != grids:
            smaller = self.family.shrink(kind, arguments, wanted)
            if smaller is not None:
                arguments, shown = smaller, self.family.geometry(kind, smaller)
        return TokenPass(
            self.asker,
            kind,
            self.asker.question(kind),
            family=self.family,
            arguments=arguments,
            whole=whole,
            shown=shown,
        )


def _named(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    return {**dict(zip(bound.signature.parameters, bound.args, strict=False)), **bound.kwargs}
