"""docs/drop-in.md as programs: its blocks, and a folder in which they run as they stand."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from tests.train.helpers import COLOURS, picture

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/drop-in.md").read_text(encoding="utf-8")
MODEL = "llava-1.5-7b-hf"
SAMPLES = 8


def blocks(heading: str) -> list[str]:
    """Python blocks of the section under a heading; of the introduction for ""."""
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.M)
    sections = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return re.findall(r"```python\n(.*?)```", sections[heading], re.S)


TWO, START = blocks("")


def run(heading: str, **replaced: str) -> dict[str, Any]:
    """Runs a section's block behind the common one, and returns what it leaves behind.

    Args:
        heading: of the section.
        replaced: text -> other text; each must be there.
    """
    (code,) = blocks(heading)
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    names: dict[str, Any] = {"__name__": "__main__"}
    for part, source in (("start", START), (heading, code)):
        exec(compile(source, f"drop-in.md, {part}", "exec"), names)
    return names


def answers(count: int = SAMPLES) -> list[tuple[str, str]]:
    """Image files and what is said about them; of uneven length."""
    rng = random.Random(3)
    return [
        (f"images/{i}.png", f"It is {rng.choice(COLOURS)}{', yes' * (i % 3)}.")
        for i in range(count)
    ]


def prepare(folder: Path, model: Path) -> Path:
    """Makes a folder to run the page in: model, pictures, data, and these as LLaVA JSON, too."""
    (folder / MODEL).symlink_to(model)
    (folder / "images").mkdir()
    rng = random.Random(7)
    lines, records = [], []
    for name, answer in answers():
        picture(answer.split()[2].strip(",."), 60 + len(lines), rng).save(folder / name)
        question = [{"type": "image", "path": name}, {"type": "text", "text": "What colour?"}]
        said = [{"type": "text", "text": answer}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": turns}))
        asked = {"from": "human", "value": "<image>\nWhat colour?"}
        talk = [asked, {"from": "gpt", "value": answer}]
        records.append({"id": name, "image": name, "conversations": talk})
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "train.json").write_text(json.dumps(records))
    return folder
