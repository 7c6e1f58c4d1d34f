"""Scores one entry at one budget on a checkpoint tuned with it, as `itprune compare` scores it.

    python -m train.compare_score MODEL DATA ENTRY KEEP OUTPUT [--rounds 5]

Unlike the command it leaves the controls out: what `random` does to a model tuned with another
method is no comparison. The controls of the table are tuned themselves. Timed is it beside dense.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from itprune import load_pretrained
from itprune.comparing.entries import DENSE, Entry, make_cases
from itprune.comparing.run import Comparison, Settings

BATCH = 16
NEW_TOKENS = 4


def main(argv: list[str] | None = None) -> int:
    """Writes OUTPUT/rows.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m train.compare_score", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("entry")
    parser.add_argument("keep", type=float)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=0)
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    settings = Settings(
        model=given.model,
        data=given.data,
        image_root=given.data.parent,
        output=given.output,
        batch_size=BATCH,
        max_new_tokens=NEW_TOKENS,
        rounds=given.rounds,
    )
    labels = [DENSE, given.entry] if given.rounds else [given.entry]
    cases = make_cases([Entry.parse(label) for label in labels], [given.keep], [0])
    Comparison(
        settings,
        cases,
        lambda: load_pretrained(given.model, device="cpu"),
        lambda line: print(line, flush=True),
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
