"""Command line of the scene generator: `python -m train.scenes OUT --train 2000 --val 500`."""

from __future__ import annotations

import argparse

from train.scenes.dataset import write_dataset


def main() -> None:
    """Write a data set of scenes and questions."""
    parser = argparse.ArgumentParser(prog="python -m train.scenes", description=__doc__)
    parser.add_argument("out", help="folder for train.json, val.json and images/")
    parser.add_argument("--train", type=int, default=2000, help="training samples")
    parser.add_argument("--val", type=int, default=500, help="validation samples")
    parser.add_argument("--seed", type=int, default=0, help="chooses scenes and questions")
    parser.add_argument(
        "--questions",
        default="base",
        help="base, quickstart, transfer, all, or kinds joined by commas",
    )
    given = parser.parse_args()
    write_dataset(given.out, given.train, given.val, given.seed, given.questions)


if __name__ == "__main__":
    main()
