"""Rebuilds the bundled model from nothing: `python -m train.tiny OUT`.

Three stages in LLaVA's order: the vision tower, alignment of projector and body on captions,
instruction tuning on the base questions. Each stage leaves its result in OUT's work folder, so
an interrupted build continues with the next stage. About an hour on one thread of a busy
CPU, half that on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import torch
from transformers import (
    CLIPVisionModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from train.tiny.language import LanguageRecipe, build_model, train_phase
from train.tiny.recipe import ALIGNMENT, INSTRUCTION
from train.tiny.rows import RowBuilder
from train.tiny.tokenizer import build_processor, build_tokenizer
from train.tiny.tower import TowerRecipe, tower_config, train_tower

logger = logging.getLogger("train.tiny")


def bundle(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Save the model in float16 and its processor as an ordinary Hugging Face folder."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.half().save_pretrained(out)
    build_processor(tokenizer).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    model.float().load_state_dict(weights)


def tower_stage(work: Path) -> CLIPVisionModel:
    """Stage 1, or its saved result."""
    folder = work / "tower"
    if not (work / "tower.done").exists():
        train_tower(TowerRecipe(), logger.info, lambda tower: tower.save_pretrained(folder))
        (work / "tower.done").touch()
    return CLIPVisionModel.from_pretrained(folder)


def language_stages(work: Path, tower: CLIPVisionModel) -> LlavaForConditionalGeneration:
    """Stages 2 and 3, continuing after the last finished phase."""
    tokenizer = build_tokenizer()
    builder = RowBuilder(tokenizer)
    torch.manual_seed(1)
    model = build_model(LanguageRecipe(), tower_config(TowerRecipe()), tokenizer)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    saved, log = work / "language.pt", work / "phases.json"
    done = json.loads(log.read_text()) if log.exists() else []
    if done:
        model.load_state_dict(torch.load(saved))
    for number, phase in enumerate([*ALIGNMENT, *INSTRUCTION]):
        if phase.name in done:
            continue
        train_phase(model, builder, phase, 100 + number, logger.info)
        torch.save(model.state_dict(), saved)
        done.append(phase.name)
        log.write_text(json.dumps(done))
    return model


def main() -> None:
    """Build the model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.tiny", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of intermediate results (OUT-work)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    work = given.work or given.out.with_name(given.out.name + "-work")
    os.makedirs(work, exist_ok=True)
    model = language_stages(work, tower_stage(work))
    bundle(model, build_tokenizer(), given.out)


if __name__ == "__main__":
    main()
