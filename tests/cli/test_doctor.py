"""itprune doctor: what it tells of each family's folder, and of folders it cannot help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from itprune.cli import main
from tests.tiny_folders import MAKERS, build_folder
from tests.tiny_templates import tokenizer

HAS_TORCHVISION = find_spec("torchvision") is not None
SCORES = dict.fromkeys(MAKERS, "attention received")
SCORES |= {"llava_next": "attention of CLS", "internvl": "attention of CLS"}
BLOCKS = {"llava_next": 1, "qwen2_5_vl": 1}
"""Which of three scores, where it is not the last."""
GRIDS = {
    "llava_next": [[4, 4], [4, 8]],
    "llava_onevision": [[4, 4], [4, 8]],
    "qwen2_vl": [[2, 5]],
    "qwen2_5_vl": [[2, 5]],
    "qwen3_vl": [[2, 5]],
    "internvl": [[2, 2]] * 3,
    "idefics3": [[2, 2]] * 3,
    "smolvlm": [[2, 2]] * 3,
    "gemma3": [[2, 2]],
    "paligemma": [[4, 4]],
}
"""Of a picture of 200 x 100 pixels; separators come on top."""


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(folder: Path, *options: str) -> Any:
        capsys.readouterr()  # what making the folder printed
        status = main(["doctor", "--model", str(folder), "--json", *options])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_is_described(name: str, doctor: Any, tmp_path: Path) -> None:
    folder = build_folder(name, tmp_path)
    found = doctor(folder, "--image-size", "200x100", "--method", "topk_cls", "--keep", "0.5")
    assert found["family"] == name
    assert found["llm_layers"] == 4
    assert found["vision_blocks"] == 3
    assert found["llm_width"] == 32
    assert found["position_axes"] == (3 if name.startswith("qwen") else 1)
    assert found["score"] == SCORES[name]
    assert found["score_block"] == BLOCKS.get(name, 2)
    assert found["missing"] == []
    picture = found["picture"]
    assert picture["grids"] == GRIDS[name]
    tokens = sum(rows * columns for rows, columns in GRIDS[name])
    assert picture["visual_tokens"] == tokens + picture["separators"]
    assert (picture["separators"] > 0) == name.startswith("llava")
    assert found["pruning"]["before_llm"]
    assert found["pruning"]["layers"] == []
    assert found["pruning"]["shares"] == [0.5]
    assert {"itprune", "topk_cls", "random"} <= set(found["runs"])
    assert "one by one" in found["refused"]["prumerge"]


def test_the_default_method_acts_in_two_stages(doctor: Any, tiny_llava_folder: Path) -> None:
    found = doctor(tiny_llava_folder)
    assert found["acts_on"] == "patches"
    assert "prumerge" in found["runs"]
    pruning = found["pruning"]
    assert pruning["method"] == "itprune"
    assert (pruning["before_llm"], pruning["layers"]) == (True, [1])
    first, later = pruning["shares"]
    assert (2 * first + 2 * later) / 4 == pytest.approx(0.22)
    assert later == pytest.approx(first * 2 / 3)


@pytest.mark.parametrize(
    ("method", "layers", "shares"),
    [
        ("fastv", [0], [1.0, 1 / 3]),
        ("pyramiddrop", [0, 1, 2], None),
        ("topk_cls+fastv", [0], None),
        ("dense", [], None),
    ],
)
def test_where_a_method_acts(
    doctor: Any, tiny_llava_folder: Path, method: str, layers: list[int], shares: Any
) -> None:
    found = doctor(tiny_llava_folder, "--method", method, "--keep", "0.5")["pruning"]
    assert found["layers"] == layers
    assert found["before_llm"] == ("topk_cls" in method)
    if shares is not None:
        assert found["shares"] == pytest.approx(shares, abs=1e-3)
    if layers:
        ends = [0, *(layer + 1 for layer in layers), 4]
        spent = [b - a for a, b in pairwise(ends)]
        average = sum(n * share for n, share in zip(spent, found["shares"], strict=True)) / 4
        assert average == pytest.approx(0.5, abs=1e-3)


def test_positions_are_told(doctor: Any, tiny_llava_folder: Path) -> None:
    found = doctor(tiny_llava_folder, "--method", "divprune", "--keep", "0.5")
    assert found["pruning"]["positions"] == "contiguous"
    found = doctor(tiny_llava_folder, "--method", "itprune", "--keep", "0.5")
    assert found["pruning"]["positions"] == "original"


def test_a_checkpoint_speaks_for_itself(doctor: Any, checkpoint: Path) -> None:
    assert doctor(checkpoint)["pruning"]["keep"] is None
    assert doctor(checkpoint, "--keep", "1.0")["pruning"]["shares"] == [1.0]


def test_it_is_told_in_words(tiny_llava_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tiny_llava_folder), "--keep", "0.5"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for line in (
        "448x448 pixels -> 16 visual tokens, in rows x columns: 4x4",
        "keep 0.5: 8 of 16 visual tokens",
        "stage 1  before the LLM (60.0%, 10 tokens)",
        "stage 2  after layer 1 (40.0%, 6 tokens)",
        "quecc*",
        "missing  nothing",
    ):
        assert line in text


def test_a_folder_without_weights_is_described(doctor: Any, tmp_path: Path) -> None:
    folder = build_folder("gemma3", tmp_path)
    (folder / "model.safetensors").unlink()
    found = doctor(folder)
    assert found["picture"]["visual_tokens"] == 4
    assert "no safetensors weights" in found["missing"][0]


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is there")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_without_torchvision_the_picture_is_still_counted(
    name: str, doctor: Any, tmp_path: Path
) -> None:
    """The folder of a model whose processor cannot be built here, as it comes from the hub."""
    images = {
        "qwen2_5_vl": hf.Qwen2VLImageProcessor(patch_size=14, merge_size=2),
        "llava_onevision": hf.LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 56]]
        ),
    }
    words = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )

    class Known:
        """What the configs ask of a processor."""

        tokenizer = words
        image_token_id, video_token_id = words.image_token_id, words.video_token_id

    MAKERS[name].config(Known).save_pretrained(tmp_path)
    for part in (words, images[name]):
        part.save_pretrained(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    values = json.loads(config.read_text()) | {
        "processor_class": {"qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(
            name, "LlavaOnevisionProcessor"
        )
    }
    config.write_text(json.dumps(values))
    try:
        hf.AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError:
        pytest.skip("this transformers has no image processors without torchvision")
    found = doctor(tmp_path, "--image-size", "200x100")
    assert "needs the package torchvision" in found["missing"][0]
    qwen = name == "qwen2_5_vl"
    assert (found["position_axes"], found["score_block"]) == ((3, 1) if qwen else (1, 2))
    expected = [[4, 7]] if name == "qwen2_5_vl" else GRIDS[name]
    assert found["picture"]["grids"] == expected


def test_what_it_cannot_examine_is_one_sentence(
    tiny_llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path, *options: str) -> str:
        capsys.readouterr()  # what making the folder printed
        assert main(["doctor", "--model", str(folder), *options]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        return err

    other = tmp_path / "other"
    hf.Blip2Config().save_pretrained(other)
    text = refusal(other)
    assert "'blip-2' is not supported" in text
    assert "qwen2_5_vl" in text
    assert "docs/add-a-family.md" in text
    assert "no such checkpoint folder" in refusal(tmp_path / "nowhere")
    assert "width x height" in refusal(tiny_llava_folder, "--image-size", "0x5")
    assert "width x height" in refusal(tiny_llava_folder, "--image-size", "large")
    assert "unknown value 'fast'" in refusal(tiny_llava_folder, "--method", "fast")
    assert "fraction" in refusal(tiny_llava_folder, "--keep", "2")
    assert "out of reach" in refusal(tiny_llava_folder, "--method", "fastv", "--keep", "0.2")
    gemma = build_folder("gemma3", tmp_path / "gemma")
    assert "one by one" in refusal(gemma, "--method", "prumerge")
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_llava_folder, wrong)
    config = wrong / "processor_config.json"
    config.write_text(config.read_text().replace('"patch_size": 14', '"patch_size": 28'))
    assert "do not belong together" in refusal(wrong)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_hidden_layers", "four"),
        ("text_config", "hidden_size", -3),
        ("vision_config", "patch_size", 0),
    ],
)
def test_values_no_model_can_be_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, value: object
) -> None:
    config = build_folder("gemma3", tmp_path) / "config.json"
    values = json.loads(config.read_text())
    values[part][name] = value
    config.write_text(json.dumps(values))
    capsys.readouterr()  # what making the folder printed
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "config.json: no model can be made of it" in err.splitlines()[-1]
