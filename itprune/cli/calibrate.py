"""`itprune calibrate`: fit a checkpoint's rule to a target average on a few hundred images.

The rule says how samples differ, `keep` how much stays on average. What is measured here is stored
in pruner.json and serves every later target. Training does it by itself; this command is for
ordinary model folders and for pictures unlike those of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itprune.cli.loading import add_model_options, check_least, load
from itprune.records import read_records

if TYPE_CHECKING:
    from itprune.answer import Answerer
    from itprune.question import Question

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PROMPT = "Describe the image."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit the pruner's counts to a target average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="LLaVA JSON, JSONL, or a folder of images"
    )
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="images of the data; default: its own folder"
    )
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="samples; default 256")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where pruner.json goes; default: into the model folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrates and stores."""
    check_least(args, limit=1, batch_size=1)
    entries = _entries(Path(args.data))
    from itprune.answer import Answerer
    from itprune.calibrating import calibrate
    from itprune.calibration import AT
    from itprune.checkpoint import PRUNER_FILE, PrunerRecord
    from itprune.config import PruneConfig

    folder = Path(args.model)
    stored = PrunerRecord.read(folder) if (folder / PRUNER_FILE).exists() else None
    fresh = stored is None and args.keep is None
    loaded = load(args, **({"keep": PruneConfig().final_keep} if fresh else {}))
    attached = loaded.attached
    assert attached is not None
    if set(attached.config.budgets) == {1.0}:
        raise ValueError("keep is 1.0, which prunes nothing; give the target as --keep 0.22")
    batches = _Batches(Answerer(loaded), entries, args)
    calibration = calibrate(attached, batches, args.limit)
    record = PrunerRecord(
        attached.config, attached.prompt, calibration, stored.recipe if stored else None
    )
    target = folder if args.output is None else Path(args.output)
    try:
        record.write(target)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from None
    print(f"{target / PRUNER_FILE}: calibrated on {batches.images} images")
    for stage, curve in calibration.curves.items():
        if any(name.startswith(f"{stage}{AT}") for name in calibration.curves):
            continue  # the first budget's, which has a name of its own
        kept = sum(f * w for f, w in zip(curve.fraction, curve.weight, strict=True))
        share, name = kept / sum(curve.weight), stage.replace(AT, " at keep ")
        print(f"  {name}: the rule alone keeps {share:.1%} of what it sees")
    if batches.bad:
        print(f"  {len(batches.bad)} sample(s) skipped, the first: {batches.bad[0]}")
    return 0


class _Batches:
    """Batches of encoded samples, spread evenly over the data."""

    def __init__(self, answerer: Answerer, entries: list[Any], args: argparse.Namespace) -> None:
        data = Path(args.data)
        self.answerer, self.size = answerer, args.batch_size
        count = min(args.limit, len(entries))
        self.entries = [entries[i * len(entries) // count] for i in range(count)]
        folder = data if data.is_dir() else data.parent
        self.root = folder if args.image_root is None else Path(args.image_root)
        self.bad: list[str] = []
        self.images = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting = []
        for entry in self.entries:
            try:
                question = self._question(entry)
                waiting.append(self.answerer.encode(question))
            except ValueError as error:
                self.bad.append(str(error))
                continue
            self.images += len(question.images)
            if len(waiting) == self.size:
                yield self.answerer.collate(waiting)
                waiting = []
        if waiting:
            yield self.answerer.collate(waiting)

    def _question(self, entry: Any) -> Question:
        from itprune.question import ImageFolder, Question, open_image

        if isinstance(entry, Path):
            return Question.from_prompt(PROMPT, [open_image(entry)])
        return Question.from_record(entry, ImageFolder(self.root))


def _entries(data: Path) -> list[Any]:
    """Paths of images, or records.

    Raises:
        ValueError: nothing there, or not JSON.
    """
    if not data.is_dir():
        return read_records(data)
    found = sorted(p for p in data.rglob("*") if p.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{data}: holds no images")
    return found
