"""The written page: what it says, what it must not hold, and the pictures beside it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itprune.inspecting.folder import MAKER, OURS
from tests.inspecting.conftest import HTML, LONG, MODEL, inspect

VOID = {"meta", "link", "img", "br", "hr", "input"}
OUTSIDE = re.compile(r"""(?:src|href|action|poster|data)\s*=\s*["']?(?!data:|#)[^"'\s>]+|url\(""")


class Page(HTMLParser):
    """Elements, texts, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[str]()
        self.attributes: list[tuple[str, str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def sources(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


@pytest.fixture(scope="module")
def text(seen: Path) -> str:
    return (seen / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def figures(seen: Path) -> dict:
    return json.loads((seen / "inspect.json").read_text(encoding="utf-8"))


def test_nothing_outside_is_named(text: str, page: Page) -> None:
    without_data = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "data:", text)
    assert not OUTSIDE.findall(without_data)
    assert "http" not in without_data.replace("http-equiv", "")
    assert "//" not in without_data
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_prompts_are_text(text: str, page: Page) -> None:
    assert HTML in page.text
    assert "<script>alert" not in text
    assert "<b>this" not in text


def test_what_the_page_says(page: Page, figures: dict) -> None:
    for said in ("What itprune kept", str(MODEL), "Where each rule cuts", "FLOPs of each layer"):
        assert said in page.text
    for rule in ("mean", "chord", "iqr", "derivative"):
        assert rule in page.text
    for question in figures["questions"]:
        steps = " → ".join(map(str, question["visual_tokens"][1:]))
        assert f"{question['visual_tokens'][0]} visual tokens → {steps}" in page.text


def test_figures_agree_with_the_answers(figures: dict) -> None:
    assert figures["made_by"] == MAKER
    assert [q["question"] for q in figures["questions"]] == [HTML, LONG]
    for question in figures["questions"]:
        pruned, dense = question["pruned"], question["dense"]
        visual = question["visual_tokens"]
        ends = [visual[0], visual[1], visual[-1]]
        assert ends == [pruned[f"visual_{k}"] for k in ("in", "stage1", "stage2")]
        assert sum(question["layer_tokens"]) == pruned["kv_entries"]
        assert dense["visual_stage2"] == dense["visual_in"] == visual[0]
        assert pruned["tokens_in"] == dense["tokens_in"]


def test_dropped_text_is_struck_through(page: Page, figures: dict) -> None:
    """A long instruction loses words after stage 2, which is behind layer 1 here."""
    question = figures["questions"][1]
    lost = question["layer_tokens"][0] - question["layer_tokens"][-1]
    visual = question["visual_tokens"][1] - question["visual_tokens"][-1]
    assert ("s" in page.tags) == (lost > visual)
    assert "s" in page.tags  # these weights and words do lose some


def test_pictures_on_the_page_are_those_beside_it(seen: Path, page: Page) -> None:
    names = sorted(p.name for p in seen.glob("*.png"))
    assert names == [f"kept-00{i}{k}.png" for i in (1, 2) for k in ("-layer0", "-layer2", "")]
    sources = page.sources()
    assert len(sources) == len(names)
    in_order = [f"kept-00{i}{k}.png" for i in (1, 2) for k in ("", "-layer0", "-layer2")]
    for source, name in zip(sources, in_order, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        file = Image.open(seen / name)
        assert shown.size == file.size == (288, 288)
        apart = np.asarray(shown, dtype=int) - np.asarray(file.convert("RGB"), dtype=int)
        assert np.abs(apart).mean() < 8  # JPEG


def test_bright_patches_are_as_many_as_the_figures_say(seen: Path, figures: dict) -> None:
    question = figures["questions"][0]
    picture = np.asarray(Image.open(seen / "kept-001.png"), dtype=int)
    for place, layer in enumerate(question["segments"], 1):
        shaded = np.asarray(Image.open(seen / f"kept-001-layer{layer}.png"), dtype=int)
        middle = (slice(12, None, 24), slice(12, None, 24))  # 12 x 12 patches of 24 pixels
        bright = (picture[middle] == shaded[middle]).all(-1)
        assert bright.sum() == question["visual_tokens"][place]


def test_a_file_of_questions(pictures: list[Path], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "a <i>"}]
    records = [
        {"id": f"<u>{i}", "image": path.name, "conversations": turns}
        for i, path in enumerate(pictures)
    ]
    records.append({"id": "text", "conversations": [{"from": "human", "value": "Hello?"}]})
    data = pictures[0].parent / "val.json"
    data.write_text(json.dumps(records))
    out = tmp_path / "see"
    assert inspect("--model", MODEL, "--data", data, "--max-new-tokens", 2, "--output", out) == 0
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<u>1" in page.text
    assert "Right answer in the data: a <i>" in page.text
    assert page.text.count("visual tokens → ") == 2 + 1  # in two prompts and at the top
    counts = re.findall(r"<title>(into the LLM|last layer) \d+: (\d+)</title>", text)
    for name in ("into the LLM", "last layer"):  # of the two that see something
        assert sum(int(count) for stage, count in counts if stage == name) == 2
    assert "i" in page.tags  # legends; what the data holds is text
    figures = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    assert figures["questions"][2]["visual_tokens"] == []
    assert len(list(out.glob("*.png"))) == 6


def test_questions_without_pictures_have_no_histogram(tmp_path: Path) -> None:
    data = tmp_path / "val.json"
    data.write_text(json.dumps([{"prompt": "Hello?"}]))
    out = tmp_path / "see"
    assert inspect("--model", MODEL, "--data", data, "--max-new-tokens", 2, "--output", out) == 0
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert "Tokens in each layer, mean" in page.text
    assert "Questions by visual tokens kept" not in page.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "pyramiddrop", "--keep", "0.5"), "No score curve"),
        (("--method", "downsample", "--keep", "0.5"), "makes the picture smaller"),
        (("--method", "random", "--keep", "0.5"), "did not keep the best by this score"),
        (("--keep", "1.0"), "keep 1"),
        (("--keep", "0.5"), "nothing is calibrated"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_methods(
    options: tuple[str, ...], said: str, pictures: list[Path], tmp_path: Path
) -> None:
    asked = ("--image", pictures[0], "--prompt", "Which?", "--max-new-tokens", 2)
    assert inspect("--model", MODEL, *asked, *options, "--output", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert said in page.text


def test_every_written_name_is_known_as_ours(seen: Path) -> None:
    assert all(OURS.fullmatch(path.name) for path in seen.iterdir())
