"""Runs inside vLLM's environment: exports a tiny model, loads it there, compares with transformers.

    python -m tests.vllm.one_family FAMILY

Writes FAMILY.json: the architecture vLLM took, and for pixels, for whole prompts as rows and for
image rows of different counts, each in one batch, how many answers of how many are the same. vLLM
refuses a folder with a name it does not know, or without one it needs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

from itprune.checkpoint import PRUNER_WEIGHTS
from itprune.cli import main as itprune
from itprune.vllm import RAGGED, architecture
from itprune.vllm.folder import ROWS
from tests.vllm.models import PLACES, QUESTION, WIDTH, build, pictures

TOKENS = 12
COUNTS = (5, 9, 16, 3, 1, 12, 7, 7)
"""Rows of images."""


class Compared:
    """One folder, in transformers and in vLLM."""

    def __init__(self, name: str, folder: Path) -> None:
        from vllm import LLM, SamplingParams

        self.name = name
        self.processor: Any = hf.AutoProcessor.from_pretrained(folder)
        model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.eval()
        options: dict[str, Any] = {}
        if name in RAGGED:
            options["hf_overrides"] = {"architectures": [architecture(name)]}
        self.vllm = LLM(
            str(folder), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16,
            limit_mm_per_prompt={"image": 2}, enable_prefix_caching=False,
            enable_prompt_embeds=name in ROWS, enable_mm_embeds=name in RAGGED, **options,
        )  # fmt: skip
        self.settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        self.text = f"{PLACES.get(name, '<image>')} {QUESTION}"

    def same(self, asked: Sequence[Any], expected: Sequence[list[int]]) -> list[int]:
        """How many answers are equal, and of how many."""
        outs = self.vllm.generate(list(asked), self.settings, use_tqdm=False)
        said = [list(out.outputs[0].token_ids) for out in outs]
        return [sum(a == b for a, b in zip(said, expected, strict=True)), len(said)]

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], start: int = 0) -> list[int]:
        """transformers' answer."""
        out = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        ids: list[int] = out[0, start:].tolist()
        return ids

    def pixels(self) -> list[int]:
        shown, expected = pictures(3), []
        nested = self.name in ("idefics3", "smolvlm")
        for picture in shown:
            given = [[picture]] if nested else [picture]
            inputs = self.processor(text=[self.text], images=given, return_tensors="pt")
            expected.append(self.generate(inputs, inputs["input_ids"].shape[1]))
        asked = [{"prompt": self.text, "multi_modal_data": {"image": p}} for p in shown]
        return self.same(asked, expected)

    def rows(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        return [torch.randn(count, WIDTH, generator=draw) * 0.5 for count in COUNTS]

    @torch.no_grad()
    def whole(self, rows: Tensor, around: tuple[str, str]) -> Tensor:
        """(T, W) a prompt with image rows in it."""
        words = self.processor.tokenizer
        before, after = (
            self.model.get_input_embeddings()(
                torch.tensor(words(part, add_special_tokens=False)["input_ids"], dtype=torch.long)
            )
            for part in around
        )
        return torch.cat([before, rows, after])

    def expected(self, prompts: Sequence[Tensor]) -> list[list[int]]:
        masks = [torch.ones(1, len(p), dtype=torch.long) for p in prompts]
        return [
            self.generate({"inputs_embeds": p[None], "attention_mask": m})
            for p, m in zip(prompts, masks, strict=True)
        ]

    def prompts(self) -> list[int]:
        prompts = [self.whole(r, ("Look:", f" {QUESTION}")) for r in self.rows()]
        return self.same([{"prompt_embeds": p} for p in prompts], self.expected(prompts))

    def images(self) -> list[int]:
        marks = ("<img>", "</img>") if self.name == "internvl" else ("", "")
        prompts = [self.whole(r, (marks[0], f"{marks[1]} {QUESTION}")) for r in self.rows()]
        asked = [{"prompt": self.text, "multi_modal_data": {"image": [r]}} for r in self.rows()]
        return self.same(asked, self.expected(prompts))


def main(name: str) -> None:
    made, folder = Path(f"{name}-made"), Path(name)
    build(name, made)
    # A method's own weights lie beside the model's, which vLLM is not to mix up.
    save_file({"weight": torch.ones(3)}, made / PRUNER_WEIGHTS)
    words = ["export", str(made), "--to", "vllm", "--output", name, "--dtype", "float32"]
    assert itprune(words) == 0
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is enough
    assert (folder / PRUNER_WEIGHTS).exists()
    compared = Compared(name, folder)
    found: dict[str, Any] = {"architecture": compared.vllm.model_config.architecture}
    found["pixels"] = compared.pixels()
    if name in ROWS:
        found["prompts"] = compared.prompts()
    if name in RAGGED:
        found["images"] = compared.images()
    Path(f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
