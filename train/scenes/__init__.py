"""Scenes of handwritten digits with questions: the bundled data set."""

from train.scenes.dataset import (
    answers,
    choose_kinds,
    majority_accuracy,
    majority_answers,
    write_dataset,
)
from train.scenes.questions import BASE, QUICKSTART

__all__ = [
    "BASE",
    "QUICKSTART",
    "answers",
    "choose_kinds",
    "majority_accuracy",
    "majority_answers",
    "write_dataset",
]
