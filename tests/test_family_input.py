"""Input that does not fit, in every family: a sentence, and the model is as usable as before."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from tests.family_configs import IMAGE
from tests.family_models import NAMES, batch, build, prompts
from tests.family_oracle import PROMPT, attached

MISMATCH = r"(?i)image features and image tokens do not match"
CONFIG = PruneConfig(keep=0.4)
ROWS = ((5, "image", 9, "answer"), (3, "wide", 4, "answer"))
every_family = pytest.mark.parametrize("name", NAMES)


@every_family
@pytest.mark.parametrize("change", ["fewer", "more"])
@pytest.mark.parametrize("method", ["itprune", "cdpruner"])
def test_a_wrong_number_of_placeholders_is_an_error(name: str, change: str, method: str) -> None:
    """Also where the host does not count, and the next forward is right again."""
    with attached(name, PruneConfig(method, keep=0.4)) as (model, _), torch.no_grad():
        data = prompts(batch(name, model, ROWS))
        expected = model(**data).logits
        ids = data["input_ids"].clone()
        row, place = (ids == IMAGE).nonzero()[5].tolist()
        if change == "fewer":
            ids[row, place] = 7
        else:
            ids[row, 2] = IMAGE
        wrong = {**data, "input_ids": ids}
        with pytest.raises(ValueError, match=MISMATCH) as refusal:
            model(**wrong)
        assert str(int((ids == IMAGE).sum())) in str(refusal.value)
        with pytest.raises(ValueError, match=MISMATCH):
            model.generate(**wrong, max_new_tokens=1)
        assert torch.equal(model(**data).logits, expected)


@every_family
def test_attention_kernels_without_a_wrap_are_refused(name: str) -> None:
    model = build(name)
    model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation set to one of: .*sdpa"):
        attach(model, CONFIG, prompt=PROMPT)
    assert model.get_decoder().config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "paligemma_2"])
def test_eager_attention_is_refused(name: str) -> None:
    """But for PaliGemma 2, whose language model has no other."""
    model = build(name)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation set to one of: .*sdpa"):
        attach(model, CONFIG, prompt=PROMPT)


@every_family
def test_embeddings_alone_are_refused(name: str) -> None:
    with attached(name, CONFIG) as (model, _), torch.no_grad():
        data = prompts(batch(name, model, ROWS))
        embeds = model.get_input_embeddings()(data.pop("input_ids"))
        with pytest.raises(ValueError, match="input_ids beside the pixels"):
            model(inputs_embeds=embeds, **data)


@every_family
def test_an_error_in_the_encoder_leaves_nothing_behind(name: str) -> None:
    with attached(name, CONFIG) as (model, _), torch.no_grad():
        data = prompts(batch(name, model, ROWS))
        expected = model(**data).logits
        block = model.get_encoder(modality="image")

        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**data)
        handle.remove()
        assert torch.equal(model(**data).logits, expected)
