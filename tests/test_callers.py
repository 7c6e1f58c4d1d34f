"""What callers do to a model besides calling it: wrap it, merge it, pack rows, prefill in chunks,
replace its methods. Each is as before, or refused with a sentence; nothing is silently wrong."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor

from itprune import PruneConfig, attach
from tests.family_configs import IMAGE, TEXT, VISION
from tests.family_models import NAMES, batch, build, prompts
from tests.family_oracle import PROMPT
from tests.oracle import drops_of, masked, recorded_rows

ROWS = ((5, "image", 9), (3, "image", 4))
FEW = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "smolvlm")
FUSED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
CONNECTED = {**dict.fromkeys(FUSED, "merger"), "idefics3": "connector", "smolvlm": "connector"}
CONFIG = PruneConfig(keep=0.4)
OLD = Version(hf.__version__) < Version("5.20")


def data_of(name: str, model: hf.PreTrainedModel, **more: object) -> dict[str, Tensor]:
    return prompts(batch(name, model, ROWS, **more))


# ---------------------------------------------------------------------------------------- PEFT
def with_adapters(model: hf.PreTrainedModel, name: str) -> torch.nn.Module:
    targets = ["q_proj", "k_proj", *(["qkv"] if name in FUSED else [])]
    projector = CONNECTED.get(name, "multi_modal_projector")
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=[projector])
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(7)
    for path, weight in adapted.named_parameters():
        if "lora_" in path:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return adapted


@pytest.mark.parametrize("name", NAMES)
def test_adapters_put_on_or_merged_while_attached_change_no_choice(name: str) -> None:
    """The tower's projections and the projector are other modules then."""
    data = data_of(name, build(name))
    with torch.no_grad():
        wrapped = with_adapters(build(name), name)
        with attach(wrapped, CONFIG, prompt=PROMPT) as pruner:
            expected, report = wrapped(**data).logits, pruner.report
            merged = wrapped.merge_and_unload()
            found = merged(**data).logits
            assert pruner.report.visual_stage1 == report.visual_stage1
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
        model = build(name)
        with attach(model, CONFIG, prompt=PROMPT) as pruner:
            late = with_adapters(model, name)(**data).logits
            assert torch.equal(late, expected)
            assert pruner.report.drops == report.drops


# ---------------------------------------------------------------------------------------- calls
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "internvl"])
def test_samples_packed_into_one_row_are_refused(name: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, (ROWS[0],)))
    del data["attention_mask"]
    length = data["input_ids"].shape[1]
    ids = torch.arange(length) % (length - 6)
    whole = torch.arange(length)[None]
    if name == "qwen3_vl":
        ids, whole = ids[None].expand(4, -1), whole[None].expand(4, -1, -1)
    with attach(model, CONFIG, prompt=PROMPT), torch.no_grad():
        model(**data, position_ids=whole, use_cache=False)
        with pytest.raises(ValueError, match="several samples packed into one row"):
            model(**data, position_ids=ids[..., None, :], use_cache=False)


@pytest.mark.skipif(OLD, reason="bare models of this transformers mix up images read in chunks")
@pytest.mark.parametrize("method", ["topk_cls", "itprune", "cdpruner"])
@pytest.mark.parametrize("name", FEW)
def test_a_prompt_read_in_chunks_is_refused(name: str, method: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, (ROWS[0],)))
    call = {**data, "max_new_tokens": 2, "do_sample": False}
    dense = model.generate(**call, prefill_chunk_size=5)
    with attach(model, PruneConfig(method, keep=0.4), prompt=PROMPT):
        with pytest.raises(ValueError, match="prefill_chunk_size unset"):
            model.generate(**call, prefill_chunk_size=5)
        model.generate(**call)
    assert torch.equal(model.generate(**call, prefill_chunk_size=5), dense)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_reads_the_question_answers_without_a_cache(name: str) -> None:
    model = build(name)
    rows = tuple((*row, "answer") for row in ROWS)  # behind its prefix nothing is a question
    data = prompts(batch(name, model, rows, side="left"))
    call = {**data, "max_new_tokens": 3, "do_sample": False}
    with attach(model, PruneConfig("cdpruner", keep=0.4), prompt=PROMPT) as pruner:
        cached = model.generate(**call)
        report = pruner.report
        found = model.generate(**call, use_cache=False)
        assert pruner.report.visual_stage1 == report.visual_stage1
    if not name.startswith("paligemma"):  # whose bare model differs without a cache up to 5.17
        assert torch.equal(found, cached)


@pytest.mark.parametrize("name", FEW)
def test_features_may_be_asked_for_as_a_tuple(name: str) -> None:
    model = build(name)
    data = data_of(name, model)
    texts = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    arguments = {key: value for key, value in data.items() if key not in texts}
    with attach(model, PruneConfig("topk_cls", keep=0.4)), torch.no_grad():
        whole = model.get_image_features(**arguments, return_dict=True)
        parts = model.get_image_features(**arguments, return_dict=False)
    assert isinstance(parts, tuple)
    assert len(parts) == len(whole.to_tuple())
    flat = torch.cat([part.reshape(-1, 32) for part in whole.pooler_output])
    embeds = torch.cat([torch.randn(5, 32), flat, torch.randn(5, 32)])[None]
    with attach(model, PruneConfig("topk_cls", keep=0.4)):
        with pytest.raises(ValueError, match="hold pruned image features"):
            model(inputs_embeds=embeds)
        model(inputs_embeds=torch.randn_like(embeds))


def test_a_method_the_instance_had_of_its_own_comes_back() -> None:
    model = build("qwen2_vl")
    data, own, calls = data_of("qwen2_vl", model), model.model.get_image_features, []

    @functools.wraps(own)
    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return own(*args, **kwargs)

    model.model.get_image_features = counted
    with attach(model, CONFIG, prompt=PROMPT), torch.no_grad():
        model(**data)
    assert calls == [1]
    assert model.model.__dict__["get_image_features"] is counted


# ------------------------------------------------------------------------------- other towers, LLMs
def llava_of(vision: hf.PreTrainedConfig, text: hf.PreTrainedConfig, **more: object) -> object:
    torch.manual_seed(0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **more)
    model = hf.LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data = torch.randn_like(weight) * weight[0].numel() ** -0.5
    return model


@pytest.mark.parametrize("text", [hf.MistralConfig, hf.Phi3Config, hf.Qwen2Config])
def test_a_window_of_every_layer_is_minded(text: type) -> None:
    """Some decoders name a sliding window, and no kinds of layers."""
    own = {"use_sliding_window": True, "max_window_layers": 0} if text is hf.Qwen2Config else {}
    config = text(**TEXT, sliding_window=8, **own)
    model = llava_of(hf.CLIPVisionConfig(**VISION), config)
    data = prompts(batch("llava", model, ROWS))
    original = PruneConfig("topk_cls", keep=0.5, positions="original")
    with attach(model, original, prompt=PROMPT), recorded_rows(model) as rows, torch.no_grad():
        found = model(**data, use_cache=False).logits
    drops = drops_of(rows)
    with masked(model, drops), torch.no_grad():
        expected = model(**data, use_cache=False).logits
    kept = ~drops[-1]
    assert (found - expected)[kept].abs().max() < 1e-5


@pytest.mark.parametrize("tower", [hf.SiglipVisionConfig, hf.PixtralVisionConfig])
def test_towers_without_a_class_token_are_refused(tower: type) -> None:
    model = llava_of(tower(**VISION), hf.LlamaConfig(**TEXT), vision_feature_layer=-1)
    with pytest.raises(ValueError, match=r"vision encoder '(siglip|pixtral)\w*' of this model"):
        attach(model, CONFIG)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_a_layer_named_in_one_call_is_refused(name: str) -> None:
    """The features would be another block's than the scores."""
    model = build(name)
    data, own = data_of(name, model), model.config.vision_feature_layer
    other = -2 if own == -1 else -1
    with attach(model, PruneConfig("topk_cls", keep=0.5)), torch.no_grad():
        expected = model(**data).logits
        assert torch.equal(model(**data, vision_feature_layer=own).logits, expected)
        with pytest.raises(ValueError, match="not the layer of the model's config"):
            model(**data, vision_feature_layer=other)
        assert torch.equal(model(**data).logits, expected)
