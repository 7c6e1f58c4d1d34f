"""A model folder as vLLM reads it: names of weights, an index of their files, commands to serve it.

Changes to a folder that transformers wrote:
    names      transformers saves a CLIP or SigLIP tower as `vision_tower.encoder…`, vLLM looks for
               `vision_tower.vision_model.encoder…`; transformers reads these, too
    an index   vLLM reads every *.safetensors of a folder without one, the pruner's weights included
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from safetensors.torch import load_file, save_file

from itprune.serving.elsewhere import FAMILIES
from itprune.vllm import RAGGED, architecture

VERSION = "0.32"
"""Of vLLM, with which the names were checked."""
TOWER = "vision_tower."
INSIDE = "vision_tower.vision_model."
WRAPPED = ("gemma3", "llava", "llava_next", "llava_onevision", "paligemma")
"""Model types whose tower vLLM keeps one name deeper."""
ALIKE = ("idefics3", "internvl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")
"""Model types whose names vLLM knows as transformers saves them."""
INDEX = "model.safetensors.index.json"
ROWS = tuple(FAMILIES)
"""Model types whose answer vLLM gives from rows alone. In the others visual tokens have several
position ids, or see each other in both directions, of which rows tell nothing."""

WHOLE = """\
## Serve with vLLM

The weights have the names vLLM looks for (checked with vLLM {version}); transformers reads these,
too. From the directory that holds this folder, without pruning:

```bash
vllm serve {name} --served-model-name {name}
```
"""
PRUNED = """\
Pruned, the encoder, stage 1 and the projector run in `itprune`, and vLLM gets the rows that stay.
One such vLLM, or several (its options are for callers you trust, so let nobody else reach it):

```bash
vllm serve {name} --served-model-name {name} --enable-prompt-embeds --enable-mm-embeds
```

and before it, or before all of them (addresses joined by commas), what users talk to:

```bash
itprune serve {name} --engine vllm --upstream http://127.0.0.1:8000 --port 8080
```
"""
RAGGED_ROWS = """\
Whoever sends `image_embeds` parts to vLLM: its own class ends the server when images that keep
different numbers of rows meet in one step. With `pip install itprune` in vLLM's environment there
is one that takes them:

```bash
vllm serve {name} --served-model-name {name} --enable-mm-embeds \\
    --hf-overrides '{override}'
```
"""
ALONE = """\
Pruned, `itprune serve` runs this model by itself. vLLM is not told where the tokens that stay
stand in the picture, or which of them see each other, and this family needs to know:

```bash
itprune serve {name}
```
"""


def check_type(model_type: str) -> None:
    """Refuses a family nobody has loaded in vLLM.

    Raises:
        ValueError: in one sentence.
    """
    known = sorted(WRAPPED + ALIKE)
    if model_type not in known:
        raise ValueError(
            f"--to vllm: nobody has checked how vLLM names the weights of {model_type!r}; "
            f"checked are {', '.join(known)}"
        )


def vllm_name(name: str, model_type: str) -> str:
    """A weight's name in vLLM, from the one transformers saves it under."""
    if model_type not in WRAPPED or not name.startswith(TOWER) or name.startswith(INSIDE):
        return name
    return INSIDE + name.removeprefix(TOWER)


def rename(folder: Path, model_type: str) -> None:
    """Renames the weights of a folder that transformers wrote, file by file.

    Args:
        folder: with model*.safetensors.
        model_type: of its config.json.

    Raises:
        ValueError: a family nobody has loaded in vLLM.
    """
    check_type(model_type)
    places: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("model*.safetensors")):
        held = {vllm_name(name, model_type): value for name, value in load_file(path).items()}
        if model_type in WRAPPED:
            save_file(held, path, {"format": "pt"})
        places |= dict.fromkeys(held, path.name)
        size += sum(value.nbytes for value in held.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def serving_section(model_type: str, name: str, pruned: bool) -> str:
    """What a folder's README.md says about serving it.

    Args:
        model_type: of its config.json.
        name: the folder's.
        pruned: whether it holds a pruner.
    """
    parts = [WHOLE]
    if pruned:
        parts.append(PRUNED if model_type in ROWS else ALONE)
        parts += [RAGGED_ROWS] if model_type in RAGGED else []
    override = json.dumps({"architectures": [architecture(model_type)]})
    return "\n".join(parts).format(name=shlex.quote(name), version=VERSION, override=override)
