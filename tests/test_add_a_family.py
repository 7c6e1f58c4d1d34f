"""docs/add-a-family.md is true: its blocks run in order, and the family they define, which is none
of this package, passes the oracles of those that are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import PruneConfig, attach, families
from itprune.families import _REGISTRY, find_family
from tests.oracle import drops_of, masked, recorded_rows

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "add-a-family.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's blocks leave behind; the family is forgotten afterwards."""
    before = dict(_REGISTRY)
    names: dict[str, Any] = {}
    for index, block in enumerate(BLOCKS):
        exec(compile(block, f"add-a-family.md, block {index}", "exec"), names)
    yield names
    _REGISTRY.clear()
    _REGISTRY.update(before)


def test_the_page_runs_and_its_class_is_short(page: dict[str, Any]) -> None:
    (code,) = (block for block in BLOCKS if "@register_family" in block)
    lines = [line for line in code.split("@register_family")[1].splitlines() if line.strip()]
    assert len(lines) <= 40
    assert "aya_vision" in families()
    assert not [path for path in (ROOT / "itprune").rglob("*.py") if "aya" in path.read_text()]


def test_every_member_is_explained() -> None:
    """The table names what a family may override, and nothing else."""
    from itprune.families.base import Family, PatchFamily, TokenFamily

    table = DOCUMENT.split("## What a family can say")[1].split("## ")[0]
    named = set()
    for cell in re.findall(r"^\| (.*?) \|", table, re.M):
        named |= {found.split("(")[0] for found in re.findall(r"`(.*?)`", cell)}
    members = {
        name
        for cls in (Family, PatchFamily, TokenFamily)
        for name in {*vars(cls), *vars(cls).get("__annotations__", {})}
        if not name.startswith("_")
    }
    assert named == members - {"model", "host", "visual_token_ids"}


def test_the_jacobian_notices_a_wrong_order(page: dict[str, Any]) -> None:
    """Patches taken four by four are not the square a token is made of."""
    truth = page["truth"]
    assert truth.sum(1).tolist() == [4] * 27
    wrong = torch.stack([patch.view(-1, 4).mean(1) for patch in torch.eye(truth.shape[1])], 1)
    assert not torch.equal(wrong > 0, truth)


@pytest.mark.parametrize("after", [(), (1, 2)], ids=["before the LLM", "inside, too"])
def test_dropping_equals_masking(page: dict[str, Any], after: tuple[int, ...]) -> None:
    """Loss and all gradients, two images in a row, padding on the left."""
    model, inputs = page["model"].train(), page["inputs"]
    data = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] < 20, -100)}
    data["labels"][data["input_ids"] == page["IMAGE"]] = -100
    data["labels"][:, -4:] = inputs["input_ids"][:, -4:]

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**data).loss
        loss.backward()
        return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    config = PruneConfig("hash_choice", keep=0.5, options={"after": after})
    with attach(model, config), recorded_rows(model) as rows:
        loss, found = step()
    drops = drops_of(rows)
    assert drops[-1].sum() > 10
    with masked(model, drops):
        expected_loss, expected = step()
    assert abs(loss - expected_loss) < 1e-5
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-5 * largest


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_masked_reference(page: dict[str, Any], beams: int) -> None:
    model, inputs = page["model"].eval(), dict(page["inputs"])
    if beams > 1:  # older transformers hand beams of a row with several images the wrong ones
        inputs = {
            "input_ids": inputs["input_ids"][1:],
            "attention_mask": inputs["attention_mask"][1:],
        }
        inputs["pixel_values"] = page["pixels"][2:]
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    settings["suppress_tokens"] = [page["IMAGE"]]  # a loop without a cache would take it for one
    with attach(model, PruneConfig("hash_choice", keep=0.5)), recorded_rows(model) as rows:
        found = model.generate(**inputs, **settings)
    with masked(model, drops_of(rows)):
        assert torch.equal(found, model.generate(**inputs, **settings, use_cache=False))


def test_text_alone_and_bad_pixels(page: dict[str, Any]) -> None:
    model, text = page["model"].eval(), torch.tensor([[1, 5, 6, 7]])
    family = find_family(model)
    assert model.get_image_features(**family.blank_image(), return_dict=True) is not None
    with torch.no_grad():
        bare = model(input_ids=text).logits
        with attach(model, PruneConfig(keep=0.3)):
            assert torch.equal(model(input_ids=text).logits, bare)
    with pytest.raises(ValueError, match="square tiles whose side is a multiple of 2"):
        family.geometry("image", {"pixel_values": torch.zeros(1, 3, 20, 24)})


OUTSIDE = '''
from itprune.families import register_family
from itprune.families.base import TokenFamily


@register_family("model_of_a_package")
class Outside(TokenFamily):
    """Brought by an entry point."""
'''


def test_an_installed_package_brings_its_families(tmp_path: Path) -> None:
    """An entry point of the group `itprune.families` is all a package needs."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = "[itprune.families]\noutside = outside\nbroken = nowhere_to_be_found\n"
    (info / "entry_points.txt").write_text(points)
    code = (
        "from itprune.families import families, family_class\n"
        "print(family_class('model_of_a_package').__name__, 'llava' in families())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "Outside True"
    assert "'broken' of nowhere_to_be_found is left out" in answer.stderr
    assert "model_of_a_package" not in families()


def test_an_unknown_model_is_told_of_this_page() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'mistral' is not supported.*docs/add-a-family\.md") as e:
        attach(MistralForCausalLM(config))
    assert all(name in str(e.value) for name in families())
