"""The README stays true: its tree exists, its method example works, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from itprune import PruneConfig, attach
from tests.models import batch, tiny_llava

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("##")[0]
    folder = ""
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        if line[4] != " ":
            folder, path = name, name
        else:
            path = folder + name
        assert (ROOT / path).exists(), path


def test_links_and_pictures_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_method_example_works() -> None:
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "brightest" in c)
    exec(compile(code, "README.md", "exec"), {})
    model = tiny_llava()
    attached = attach(model, PruneConfig("brightest", keep=0.25))
    with torch.no_grad():
        model(**batch())
    assert sum(attached.report.visual_stage1) == sum(attached.report.visual_in) // 4


def test_the_documented_method_works_and_is_short() -> None:
    document = (ROOT / "docs" / "add-a-method.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", document, re.S) if "contrast" in c)
    body = code.split("@register_method")[1]
    assert len(body.strip().splitlines()) < 20
    exec(compile(code, "add-a-method.md", "exec"), {})
    model, data = tiny_llava(), batch()
    with attach(model, PruneConfig("contrast+fastv", keep=0.25)) as attached, torch.no_grad():
        model(**data)
        report = attached.report
    assert report.visual_stage1[:2] == [18, 18]
    assert report.visual_layer_average < 0.3
