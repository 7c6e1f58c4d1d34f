"""`itprune export --to vllm`, as far as it can be checked without vLLM; tests/vllm has the rest."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from itprune import PromptFormat, PruneConfig, attach, families, load_pretrained, save_pretrained
from itprune.checkpoint import PRUNER_WEIGHTS, PrunerRecord
from itprune.cli import COMMANDS, main, make_parser
from itprune.vllm import RAGGED, architecture
from itprune.vllm.folder import ALIKE, INDEX, ROWS, WRAPPED, check_type, serving_section, vllm_name
from tests.vllm.documented import commands, documented


def export(folder: Path, output: Path, *options: str) -> None:
    words = ["export", str(folder), "--to", "vllm", "--output", str(output), *options]
    assert main(words) == 0


def test_names_index_pruner_and_card(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployed"
    export(checkpoint, out, "--dtype", "float32")
    held, before = load_file(out / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight" in held
    assert not [n for n in held if re.match(r"vision_tower\.(?!vision_model\.)", n)]
    assert len(held) == len(before)
    assert all(torch.equal(held[vllm_name(n, "llava")], value) for n, value in before.items())
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(held), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in held.values())

    assert PrunerRecord.read(out) == PrunerRecord.read(checkpoint)
    AutoProcessor.from_pretrained(out)
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert load_pretrained(out, device="cpu").attached is not None

    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name")
    assert card.count("## Serve with vLLM") == 1
    serve = [c for c in commands(card) if c[:2] == ["vllm", "serve"]]
    assert [c[2] for c in serve] == ["deployed"] * 3
    override = json.loads(serve[-1][serve[-1].index("--hf-overrides") + 1])
    assert override == {"architectures": ["ItpruneLlavaForConditionalGeneration"]}


def test_the_output_has_a_name_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    assert main(["export", str(folder), "--to", "vllm", "--dense"]) == 0
    card = (tmp_path / "run-vllm" / "README.md").read_text()
    assert "without pruning" in card
    assert "itprune serve" not in card
    assert not (tmp_path / "run-vllm" / "pruner.json").exists()


def test_a_folder_without_a_name_is_named_after_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a run"
    shutil.copytree(checkpoint, folder)
    monkeypatch.chdir(folder)
    assert main(["export", ".", "--to", "vllm"]) == 0
    card = (tmp_path / "a run-vllm" / "README.md").read_text()
    serve = [c for c in commands(card) if c[1:2] == ["serve"]]
    assert {c[2] for c in serve} == {"a run-vllm"}


def test_several_files_and_a_method_with_weights_of_its_own(base: Path, tmp_path: Path) -> None:
    """vLLM reads every *.safetensors of a folder whose index does not say otherwise."""
    loaded = load_pretrained(base, device="cpu")
    prompt = PromptFormat.from_processor(loaded.processor)
    attached = attach(loaded.model, PruneConfig("quecc", 0.25), prompt=prompt)
    save_pretrained(tmp_path / "trained", loaded.model, loaded.processor, attached)
    out = tmp_path / "out"
    export(tmp_path / "trained", out, "--dtype", "float32", "--max-shard-size", "100KB")
    places = json.loads((out / INDEX).read_text())["weight_map"]
    files = {path.name: set(load_file(path)) for path in out.glob("model*.safetensors")}
    assert len(files) > 1
    assert {n: {k for k, at in places.items() if at == n} for n in files} == files
    assert (out / PRUNER_WEIGHTS).exists()
    assert PRUNER_WEIGHTS not in places.values()
    again = load_pretrained(out, device="cpu").attached
    assert again is not None
    assert again.config.method == "quecc"


def test_every_family_is_known_and_others_are_refused() -> None:
    assert {*WRAPPED, *ALIKE} == set(families())
    assert set(RAGGED) <= set(ROWS) <= {*WRAPPED, *ALIKE}
    assert architecture("qwen2_vl") is None
    with pytest.raises(ValueError, match="'mllama'; checked are gemma3, idefics3"):
        check_type("mllama")


def test_a_family_nobody_has_loaded_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before its weights are read."""
    monkeypatch.setattr("itprune.vllm.folder.WRAPPED", ("gemma3",))
    monkeypatch.setattr("itprune.export.read_model", None)
    words = ["export", str(checkpoint), "--to", "vllm", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert "how vLLM names the weights of 'llava'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_vllms_already_stays(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "once")
    export(tmp_path / "once", tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    odd = {f"x.{name}": value for name, value in once.items()}
    save_file(odd, tmp_path / "once" / "model.safetensors", {"format": "pt"})
    assert main(["export", str(tmp_path / "once"), "--output", str(tmp_path / "odd")]) == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_our_own_commands_can_be_read(family: str) -> None:
    own = [c for c in commands(serving_section(family, "deployed", True)) if c[0] == "itprune"]
    assert own
    for command in [*own, *documented("itprune")]:
        if command[1] in COMMANDS:
            make_parser().parse_args(command[1:])
