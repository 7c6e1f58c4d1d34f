"""The model class by itself; collected where lmms-eval is installed (test_plugin.py starts it)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lmms_eval.models import get_model
from PIL import Image

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny-llava"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
DOCUMENTS = [[PICTURE], [PICTURE, PICTURE], ["film.mp4"], None]


def model(words: str = "", **additional: Any) -> Any:
    """As lmms-eval makes it: from the words of --model_args."""
    text = ",".join(part for part in (f"pretrained={MODEL}", words) if part)
    made = get_model("itprune").create_from_arg_string(text, {"device": "cpu", **additional})
    made.task_dict = {"task": {"test": DOCUMENTS}}
    return made


def ask(prompt: str, document: int = 0, **settings: Any) -> SimpleNamespace:
    settings = {"max_new_tokens": 6, **settings}
    return SimpleNamespace(args=(prompt, settings, lambda found: found, document, "task", "test"))


def judge(prompt: str, target: Any, document: int = 0) -> SimpleNamespace:
    return SimpleNamespace(args=(prompt, target, lambda found: found, document, "task", "test"))


@pytest.fixture(scope="module")
def pruned() -> Any:
    return model("keep=0.3,method=visionzip", batch_size="4")


def test_arguments_reach_the_checkpoint(pruned: Any) -> None:
    attached = pruned.answerer.loaded.attached
    assert (attached.config.method, attached.keep) == ("visionzip", 0.3)
    assert pruned.batch_size == 4
    assert str(pruned.device) == "cpu"
    assert model().answerer.loaded.attached is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("keep=3", "keep: must be a fraction"),
        ("method=nope", "unknown value 'nope'"),
        ("dtype=half", "dtype: unknown value 'half'"),
        ("batch_size=auto", "batch_size=auto: must be a number"),
        ("batch_size=0", "batch_size: must be at least 1"),
        ("metod=visionzip", "unknown argument 'metod'; did you mean 'method'"),
    ],
)
def test_wrong_arguments_are_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(words)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        get_model("itprune").create_from_arg_string(f"pretrained={tmp_path / 'gone'}")


def test_stop_strings_end_answers(pruned: Any) -> None:
    (whole,) = pruned.generate_until([ask("What digit is red?")])
    assert whole.text
    (cut,) = pruned.generate_until([ask("What digit is red?", until=[whole.text[-1]])])
    assert cut.text == whole.text.partition(whole.text[-1])[0].strip()


def test_requests_of_several_settings_come_back_in_order(pruned: Any) -> None:
    requests = [
        ask("Is there a 4?", max_new_tokens=1 + i % 2, until=str(i)) if i % 3 else ask("How many?")
        for i in range(7)
    ]
    together = pruned.generate_until(requests)
    alone = [pruned.generate_until([request])[0] for request in requests]
    assert [one.text for one in together] == [one.text for one in alone]


def test_what_cannot_be_asked_is_empty_and_told(pruned: Any) -> None:
    requests = [
        ask("What happens?", document=2),
        ask("What digit is red?"),
        ask("<image> <image> <image>?", document=1),
        ask("<image> or <image>?", document=1),
        ask("A red 4 is there. Which digit is red?", document=3),
    ]
    found = pruned.generate_until(requests)
    assert [bool(one.text) for one in found] == [False, True, False, True, True]
    assert found[0].token_counts is None


def test_when_nothing_can_be_asked_the_run_stops(pruned: Any) -> None:
    with pytest.raises(ValueError, match="none of the 1 questions could be asked"):
        pruned.generate_until([ask("What happens?", document=2)])


def test_beams_are_refused(pruned: Any) -> None:
    with pytest.raises(ValueError, match="num_beams=3"):
        pruned.generate_until([ask("What digit is red?", num_beams=3)])


def test_sampling_depends_on_the_seed() -> None:
    draws = [
        [one.text for one in model(f"seed={seed}").generate_until(requests)]
        for seed in (1, 1, 2)
        for requests in [[ask(f"How many {word}?", temperature=5.0) for word in ("4", "5", "red")]]
    ]
    assert draws[0] == draws[1] != draws[2]


def test_judged_answers_come_as_lmms_eval_scores_them(pruned: Any) -> None:
    requests = [
        judge("What digit is red?", " 4"),
        judge("What digit is red?", lambda found: "blue"),
        judge("A red 4 is there. Which digit is red?", "4", document=3),
    ]
    found = [one.text for one in pruned.loglikelihood(requests)]
    assert all(loss > 0 and isinstance(greedy, bool) for loss, greedy in found)


def test_nothing_asked_is_nothing_answered(pruned: Any) -> None:
    assert pruned.loglikelihood([]) == []
    assert pruned.generate_until([]) == []


def test_dialogues_are_refused(pruned: Any) -> None:
    with pytest.raises(NotImplementedError, match="tasks of one round"):
        pruned.generate_until_multi_round([])


def test_memory_is_given_back() -> None:
    made = model()
    made.clean()
    assert "answerer" not in vars(made)
