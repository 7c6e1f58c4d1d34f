"""Engine: the removable hooks that put a method inside a stock model's forward.

    model(…)                        request: tokens, labels; label-only logits
      encoder                       q, k and output of the feature block are tapped
      visual tokens                 stage 1: dropped slots become zero
      text model                    a Context is opened; it travels with the call
        layer 0 … depth - 1         short hidden states, rotary tables, mask; stage 2 in between
        last layer                  rows are scattered back to (B, S, D)
      lm_head                       runs at supervised positions only (training)

No forward is copied, no class is touched; `detach` removes every hook and restores the attention
implementation's name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from itprune.config import PruneConfig
from itprune.engine.attention import pruned_name
from itprune.engine.blank import nothing
from itprune.engine.cache import check_dynamic, is_pruned
from itprune.engine.context import CONTEXT, Context
from itprune.engine.encoder import EncoderHooks
from itprune.engine.features import TokenHooks
from itprune.engine.patches import PatchHooks
from itprune.engine.positions import Positions
from itprune.engine.question import Question, QuestionReader, many_ranks
from itprune.engine.request import Request, check_one_sample
from itprune.engine.sequence import Sequence
from itprune.engine.spare import Savings
from itprune.families.base import Family, PatchFamily, TokenFamily
from itprune.methods.base import Method
from itprune.prompt import PromptFormat
from itprune.report import Report, Totals
from itprune.trace import Trace


class Carried:
    """A context on its way through the layers: no dataclass, which FSDP in mixed precision copies
    on the way into each of them."""

    def __init__(self, context: Context) -> None:
        self.context = context


def _carried(kwargs: dict[str, Any]) -> Context | None:
    carried: Carried | None = kwargs.get(CONTEXT)
    return None if carried is None else carried.context


class Engine:
    """Owns the hooks on one model and the two short-lived records between them."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        method: Method,
        config: PruneConfig,
        prompt: PromptFormat,
    ) -> None:
        self.family, self.method, self.config, self.prompt = family, method, config, prompt
        self.report: Report | None = None
        self.totals = Totals()
        self.trace: Trace | None = None
        self.label_only = False  # in every call that has labels, whatever its mode
        self.packs_text = False  # batches of text alone, too, learn without their padding
        self._text = family.text_model
        self._depth = len(family.layers)
        self._plain = packable(family)
        self._arguments = tuple(signature(model.forward).parameters)
        self._inner_arguments = tuple(signature(model.base_model.forward).parameters)
        self._request: Request | None = None
        self._inner = False
        self._reader = QuestionReader(
            self._text, model.get_input_embeddings(), self._text.config.hidden_size
        )
        self._renumber = (self._renumbers("before_llm"), self._renumbers("layers"))
        self._attention = self._rename_attention()  # raises before there are hooks
        self.vision = self._encoder_hooks()
        self._savings = Savings(family, method)
        self._handles: list[RemovableHandle] = [*self._savings.handles]
        self._install(model)

    def _renumbers(self, place: str) -> bool:
        if self.family.position_axes > 1:  # what a method publishes is for one id a token
            return False
        return (self.config.positions or self.method.positions_at(place)) == "contiguous"

    @property
    def video(self) -> str:
        """frame or clip: what a budget is for."""
        return self.config.video

    def _encoder_hooks(self) -> EncoderHooks[Any]:
        if isinstance(self.family, PatchFamily):
            return PatchHooks(self, self.family)
        assert isinstance(self.family, TokenFamily)
        return TokenHooks(self, self.family)

    # ------------------------------------------------------------------------ attach, detach
    def _rename_attention(self) -> list[tuple[Any, str]]:
        """Puts our named attention on tower and text model; returns what to restore."""
        configs = {id(m.config): m.config for m in (self._text, self.family.tower)}
        before = [(config, config._attn_implementation) for config in configs.values()]
        text, eager = self._text.config, self.family.eager
        named = [  # raises before changing anything
            (config, pruned_name(name, eager if config is text else None))
            for config, name in before
        ]
        for config, name in named:
            config._attn_implementation = name
        return before

    def _install(self, model: PreTrainedModel) -> None:
        layers = self.family.layers
        pre: Any = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        post: Any = nn.Module.register_forward_hook
        head = model.get_output_embeddings()
        self._handles += [
            pre(model, self._open_request),
            post(model, self._close_request, always_call=True),
            pre(model.base_model, self._open_inner),
            post(model.base_model, self._close_inner, always_call=True),
            pre(head, self._before_head),
            pre(self._text, self._open_context),
            post(self._text, self._close_context, with_kwargs=True, always_call=True),
            post(layers[-1], self._after_last_layer, with_kwargs=True),
        ]
        self.vision.install()
        for index, layer in enumerate(layers):
            hook = functools.partial(self._before_layer, index)
            self._handles.append(pre(layer, hook))

    def detach(self) -> None:
        """Removes every hook; the model is what it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.vision.remove()
        for config, name in self._attention:
            config._attn_implementation = name
        self._attention.clear()

    # ------------------------------------------------------------------------ whole model
    def _open_inner(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A trainer with a loss of its own may call the model without its head."""
        self._inner = self._request is None
        return self._open(self._inner_arguments, base, args, kwargs) if self._inner else None

    def _close_inner(self, base: nn.Module, args: Any, output: Any) -> None:
        if self._inner:
            self._inner = False
            self._close_request(base, args, output)

    def _open_request(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._open(self._arguments, model, args, kwargs)

    def _open(
        self, names: tuple[str, ...], model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        request = Request.read({**dict(zip(names, args, strict=False)), **kwargs}, model.training)
        wanted = self.config.label_only_logits
        active = not self.method.idle and request.has_images
        if active:
            request.check_prunable()
            kwargs = request.without_placeholders(kwargs, self.family.visual_token_ids)
        cache = kwargs.get("past_key_values")
        if active and isinstance(cache, Cache):
            check_dynamic(cache)
        short = wanted == "pruned" and self._shortens(request)
        learns = model.training and (wanted == "always" or short)
        if learns or self.label_only:
            kwargs = request.label_only(kwargs)
        self._request = request
        if active and self.method.needs_question:
            self.vision.answer_late(request.encoded)
        return args, kwargs

    def _close_request(self, model: nn.Module, args: Any, output: Any) -> None:
        self._request = self.vision.current = None  # an encoder that failed left its pass open

    def _before_head(self, head: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        request = self._request
        if request is None or request.head_mask is None:
            return None
        return (args[0][request.head_mask], *args[1:]), kwargs

    # ------------------------------------------------------------------------ vision
    def question(self, kind: str) -> Question | None:
        """The questions beside the images, or videos, of the call; None outside of one."""
        request = self._request
        if request is None or request.ids is None:
            return None
        ids = request.ids
        sequence = self._sequence(request, tuple(ids.shape), ids.device)
        visual = (ids == self.family.placeholders[kind]) & sequence.valid
        return Question(ids, sequence, visual, self._reader)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A method is asked: the hooks are deaf, so that it may use projector and LLM itself."""
        request, self._request = self._request, None
        current, self.vision.current = self.vision.current, None
        try:
            yield
        finally:
            self._request, self.vision.current = request, current

    # ------------------------------------------------------------------------ text model
    def _open_context(self, text: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        request, embeds = self._request, kwargs.get("inputs_embeds")
        if request is None or embeds is None:
            return None
        if request.ids is None and self.vision.works:
            request.check_embedded(embeds)
        if text.training and not request.has_images and many_ranks():
            # Here, where a real image's features come in: ZeRO-3 gathers weights in module order.
            kwargs = {**kwargs, "inputs_embeds": embeds + nothing(self.family, embeds)}
        active = request.has_images and not self.method.idle
        cache = kwargs.get("past_key_values")
        if not (self._shortens(request) or is_pruned(cache)):
            return args, kwargs
        kwargs = {**kwargs, **self._cache_kwargs(kwargs)}
        added = self.family.added_after_layers(kwargs) if active else None
        context = self._context(request, kwargs, active)
        context.added = added
        if context.first is not None and context.plain and context.past == 0:
            # Rows carry the padding already: spare the host its S x S mask.
            kwargs["attention_mask"] = torch.ones_like(context.sequence.valid, dtype=torch.long)
        return args, {**kwargs, CONTEXT: Carried(context)}

    def _shortens(self, request: Request) -> bool:
        """Whether layers of this call may run on fewer positions than the host made."""
        text = self.packs_text and self._text.training
        return (request.has_images or text) and not self.method.idle

    def _cache_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The cache, made early so that its layers can be replaced; none while training."""
        if kwargs.get("past_key_values") is not None:
            return {}
        if self._text.training or kwargs.get("use_cache") is False:
            return {"use_cache": False}
        wanted = kwargs.get("use_cache")
        if not (self._text.config.use_cache if wanted is None else wanted):
            return {}
        return {"past_key_values": DynamicCache(config=self._text.config)}

    def _context(self, request: Request, kwargs: dict[str, Any], active: bool) -> Context:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        if active and mask is None and cache is None:
            check_one_sample(kwargs.get("position_ids"))
        past = cache.get_seq_length() if cache is not None else 0
        plain = self._plain and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        samples, length = embeds.shape[:2]
        if active:
            sequence = self._sequence(request, (samples, length), embeds.device)
        else:  # nothing is chosen: a decoding step needs to know no more than the padding
            sequence = request.padding((samples, length), embeds.device)
        packed = self.config.layout == "packed" and plain and past == 0
        return Context(
            sequence=sequence,
            depth=self._depth,
            past=past,
            plain=plain,
            cache=cache,
            flash="flash" in self._text.config._attn_implementation,
            method=self.method if active else None,
            first=sequence.rows(embeds, packed) if self._shortens(request) else None,
            packed=packed,
            causal=self.family.causal,
            host=self,
            positions=Positions(self, sequence, self._renumber),
            spared=self._savings.forward(sequence, active, plain and past == 0),
        )

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.family.rotary(hidden, position_ids, layer)

    def query_key(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        module = self.family.layers[layer]
        attention = self.family.attention(module)
        normed = self.family.input_norm(module)(hidden)
        attention(hidden_states=normed, attention_mask=None, past_key_values=None, **kwargs)

    def _sequence(self, request: Request, shape: tuple[int, ...], device: Any) -> Sequence:
        samples, length = shape
        return request.sequence(
            (samples, length), device, self.family.visual_token_ids, self.prompt
        )

    def _close_context(self, text: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        context = _carried(kwargs)
        report = context.close(self.trace) if context is not None else None
        if report is not None:
            self.report = report
            self.totals.add(report)

    def _before_layer(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        context = _carried(kwargs)
        if context is None:
            return None
        changed = context.before_layer(index, args[0], kwargs)
        return None if changed is None else ((changed[0], *args[1:]), changed[1])

    def _after_last_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        context = _carried(kwargs)
        if context is None:
            return None
        if isinstance(output, tuple):
            return (context.after_last(output[0]), *output[1:])
        return context.after_last(output)


def packable(family: Family) -> bool:
    """Whether a decoder's rows can be packed exactly. Asked before there are hooks."""
    config = family.text_model.config
    eager = config._attn_implementation == "eager"  # it gets no mask by flag
    return family.causal and not (_slides(config) or eager)


def _slides(config: PreTrainedConfig) -> bool:
    """Some layers attend to less than the whole past, so their masks carry more than causality."""
    values = config.to_dict()
    types = values.get("layer_types")
    if types:
        return any(kind != "full_attention" for kind in types)
    return values.get("sliding_window") is not None  # Mistral, Phi-3, …: one kind of layer
