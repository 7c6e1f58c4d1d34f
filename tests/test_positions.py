"""Contiguous position ids behind the prompt: decoding, turns, beams, cropping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from itprune import PromptFormat, PruneConfig, attach
from tests.models import ASSISTANT, ROWS, batch, prompts, tiny_llava

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
METHODS = ("vtc_cls", "pyramiddrop", "visionzip+pyramiddrop", "quecc", "aim")
LATER = (*METHODS, "topk_cls+pyramiddrop")


def answered(side: str = "left") -> dict[str, Tensor]:
    """Three prompts that end with the assistant's prefix: one image, two images, text only."""
    data = prompts(batch((ROWS[0][:3], ROWS[2][:5], (7,)), side=side))
    prefix = torch.tensor(ASSISTANT).expand(3, -1)
    return {
        **data,
        "input_ids": torch.cat([data["input_ids"], prefix], 1),
        "attention_mask": torch.cat([data["attention_mask"], torch.ones_like(prefix)], 1),
    }


def row_of(data: dict[str, Tensor], row: int, pictures: slice) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    mask = data["attention_mask"][row].bool()
    return {
        "input_ids": data["input_ids"][row, mask][None],
        "attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.long),
        "pixel_values": data["pixel_values"][pictures],
    }


def config(name: str, positions: str | None = None) -> PruneConfig:
    options = {"kernel": 2} if name == "quecc" else {}
    keep = None if name == "quecc" else 0.5
    return PruneConfig(name, keep=keep, positions=positions, options=options)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_goes_on_where_the_first_ended(name: str) -> None:
    model, data = tiny_llava(), answered()
    torch.manual_seed(0)
    with attach(model, config(name), prompt=PROMPT), torch.no_grad():
        mask = data["attention_mask"]
        ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.get_decoder().config)
        model(**data, position_ids=ids, past_key_values=cache)
        more = torch.tensor([[11, 12, 13, 14]]).expand(3, -1)
        full = torch.cat([mask, torch.ones_like(more)], 1)
        later = ids[:, -1:] + torch.arange(1, 5)
        found = model(
            input_ids=more, attention_mask=full, position_ids=later, past_key_values=cache
        ).logits
        whole = {**data, "input_ids": torch.cat([data["input_ids"], more], 1)}
        whole["attention_mask"] = full
        expected = model(**whole, position_ids=torch.cat([ids, later], 1), use_cache=False).logits
    assert (found - expected[:, -4:]).abs().max() < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_beams_of_a_batch_are_beams_of_its_rows(name: str) -> None:
    model, data = tiny_llava(), answered()
    how = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "suppress_tokens": [290]}
    torch.manual_seed(0)
    with attach(model, config(name), prompt=PROMPT):
        found = model.generate(**data, **how)[:, -4:]
        images = {0: slice(0, 1), 1: slice(1, 3)}
        for row, pictures in images.items():
            alone = row_of(data, row, pictures)
            assert torch.equal(model.generate(**alone, **how)[0, -4:], found[row])


def test_renumbering_changes_what_the_model_computes() -> None:
    data, logits = answered(), {}
    for positions in ("original", "contiguous"):
        with attach(model := tiny_llava(), config("vtc_cls", positions), prompt=PROMPT):
            logits[positions] = model(**data).logits[:, -1]
    first, second = logits.values()
    assert (first[:2] - second[:2]).abs().max() > 1e-3
    assert torch.equal(first[2], second[2])  # a row without images


def test_a_renumbered_prompt_is_not_cropped_into() -> None:
    model, data = tiny_llava(), answered()
    with attach(model, config("vtc_cls"), prompt=PROMPT), torch.no_grad():
        cache = DynamicCache(config=model.get_decoder().config)
        model(**data, past_key_values=cache)
        cache.crop(data["input_ids"].shape[1])  # nothing to remove
        with pytest.raises(ValueError, match=r"prune\.positions: original"):
            cache.crop(5)


@pytest.mark.parametrize("name", LATER)
def test_images_of_later_turns_go_on_where_earlier_ones_ended(name: str) -> None:
    """Text, then images, then images again: a batch is its rows."""
    turns = [
        prompts(batch(rows, side="left", seed=seed))
        for seed, rows in enumerate([((4,), (3,)), ((4, "image", 6), (3, "image", 5))])
    ]
    turns.append(prompts(batch(((2, "image", 5), (2, "image", 5)), seed=2)))
    model = tiny_llava()

    def run(row: int | None) -> Tensor:
        cache, mask, out = DynamicCache(config=model.get_decoder().config), None, []
        for turn in turns:
            one = dict(turn)
            if row is not None:
                real = turn["attention_mask"][row].bool()
                one = {k: v[row : row + 1] for k, v in turn.items()}
                one["input_ids"] = turn["input_ids"][row, real][None]
                one["attention_mask"] = torch.ones_like(one["input_ids"])
            now = one["attention_mask"]
            mask = now if mask is None else torch.cat([mask, now], 1)
            ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -now.shape[1] :]
            one |= {"attention_mask": mask, "position_ids": ids, "past_key_values": cache}
            out.append(model(**one).logits[:, -1])
        return torch.cat(out, 1)

    torch.manual_seed(0)
    with attach(model, config(name), prompt=PROMPT), torch.no_grad():
        together = run(None)
        for row in range(2):
            assert (run(row)[0] - together[row]).abs().max() < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_an_assistant_model_may_guess_behind_the_prompt(name: str) -> None:
    """Its guesses are in the prompt's own forward, and some are cropped away again."""
    model, data = tiny_llava(), answered()
    one = row_of(data, 0, slice(0, 1))
    how = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [290]}
    torch.manual_seed(0)
    with attach(model, config(name), prompt=PROMPT):
        plain = model.generate(**one, **how)
        assert torch.equal(model.generate(**one, **how, assistant_model=tiny_llava()), plain)


def test_a_speculating_assistant_crops_what_was_decoded() -> None:
    model, data = tiny_llava(), answered()
    one = row_of(data, 0, slice(0, 1))
    how = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [290]}
    with attach(model, config("vtc_cls"), prompt=PROMPT):
        plain = model.generate(**one, **how)
        assert torch.equal(model.generate(**one, **how, prompt_lookup_num_tokens=3), plain)
