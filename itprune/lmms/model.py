"""The model class lmms-eval asks: any checkpoint of ours, on the tokens its pruner keeps.

Loading, prompts, batches and decoding are those of `itprune infer`, so both give the same answers.
lmms-eval starts the processes and deals out the documents; each process holds a model of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from itprune.answer import Answer, Answerer, Encoded
from itprune.cli.loading import DTYPES, load
from itprune.lmms.asked import Asked, batches
from itprune.lmms.likelihood import Likelihood, answer_ids, likelihoods
from itprune.lmms.settings import LONGEST, cut, decoding, stop_strings, unused
from itprune.lmms.tally import Tally
from itprune.options import check_choice, check_positive, nearest

ARGUMENTS = (
    "pretrained",
    "keep",
    "method",
    "device",
    "dtype",
    "batch_size",
    "seed",
    "max_new_tokens",
)


class Itprune(lmms):
    """A checkpoint under `lmms-eval --model itprune`; the arguments are those of --model_args.

    Args:
        pretrained: the checkpoint's folder, or an ordinary model folder.
        keep: average share of visual tokens kept instead of the checkpoint's; 1.0 runs dense.
        method: choose tokens by this method, or several: a+b.
        device: cpu, cuda, cuda:1 …; with several processes accelerate gives each its own.
        dtype: float32, bfloat16 or float16; default float32 on a CPU, else the weights' own.
        batch_size: questions answered together.
        seed: of sampling.
        max_new_tokens: longest answer where a task does not say.

    Raises:
        ValueError: anything that stands against it, in one sentence.
    """

    def __init__(
        self,
        pretrained: str,
        keep: float | None = None,
        method: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
        max_new_tokens: int = LONGEST,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise ValueError(f"--model_args: unknown argument {name!r}; {nearest(name, ARGUMENTS)}")
        if dtype is not None:
            check_choice("dtype", dtype, DTYPES)
        self.batch_size = _batch_size(batch_size)
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        wanted = argparse.Namespace(
            model=str(pretrained), keep=keep, method=method, device=device, dtype=dtype
        )
        self.answerer = Answerer(load(wanted))
        self.device = self.answerer.model.device

    # ------------------------------------------------------------------------------- requests
    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers questions.

        Returns:
            One GenerationResult for each request; an empty text where it could not be asked.

        Raises:
            ValueError: settings that are not possible, memory that does not suffice, or no
                question that could be asked.
        """
        asked = [Asked.to_answer(index, request) for index, request in enumerate(requests)]
        self._tell_unused(asked)
        results = [GenerationResult("")] * len(asked)
        tally = Tally()
        with self._progress(len(asked)) as bar:
            for batch in batches(asked, self.batch_size):
                for one, answer in self._answer(batch, tally):
                    results[one.index] = _result(answer, one)
                bar.update(len(batch))
        self._tell(tally)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Judges given answers, as multiple choice needs it.

        Returns:
            For each request the mean negative log-likelihood of the answer's tokens and whether
            the model would have given it, wrapped as lmms-eval 0.7 wants it: it makes text of a
            plain pair and cannot score that. Its scoring takes the answer with the lowest figure,
            as its own models return losses, too.

        Raises:
            ValueError: a question that cannot be asked, or memory that does not suffice.
        """
        asked = [Asked.to_judge(index, request) for index, request in enumerate(requests)]
        results = [GenerationResult("")] * len(asked)
        with self._progress(len(asked)) as bar:
            for batch in batches(asked, self.batch_size):
                for one, found in zip(batch, self._judge(batch), strict=True):
                    results[one.index] = GenerationResult((found.loss, found.greedy))
                bar.update(len(batch))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "itprune answers tasks of one round; tasks that continue a dialogue "
            "(generate_until_multi_round) cannot be run with it"
        )

    def clean(self) -> None:
        """Gives the model's memory back, before lmms-eval scores."""
        del self.answerer
        super().clean()

    # ------------------------------------------------------------------------------- one batch
    def _answer(self, batch: Sequence[Asked], tally: Tally) -> list[tuple[Asked, Answer]]:
        settings = batch[0].settings
        draw = decoding(settings, self.seed, self.max_new_tokens)
        answerer = Answerer(self.answerer.loaded, draw)
        ready: list[tuple[Asked, Encoded]] = []
        for one in batch:
            try:
                ready.append((one, answerer.encode(one.question(self.task_dict))))
            except ValueError as error:
                tally.failed += 1
                logger.warning(f"{one.task}, document {one.document}: {error}; its answer is empty")
        if not ready:
            return []
        answers = answerer.answer([encoded for _, encoded in ready])
        tally.add(answers)
        return [(one, answer) for (one, _), answer in zip(ready, answers, strict=True)]

    def _judge(self, batch: Sequence[Asked]) -> list[Likelihood]:
        questions = [one.question(self.task_dict) for one in batch]
        answers = [
            answer_ids(self.answerer, question, one.answer(self.task_dict))
            for one, question in zip(batch, questions, strict=True)
        ]
        encoded = [self.answerer.encode(question) for question in questions]
        return likelihoods(self.answerer, encoded, answers)

    # ------------------------------------------------------------------------------- telling
    def _progress(self, total: int) -> tqdm[Any]:
        return tqdm(total=total, disable=self.rank != 0, desc="itprune", unit="question")

    def _tell_unused(self, asked: Sequence[Asked]) -> None:
        names = {name for one in asked for name in unused(one.settings)}
        if names:
            logger.warning(f"the task's {', '.join(sorted(names))} is not obeyed by itprune")

    def _tell(self, tally: Tally) -> None:
        """Figures of this process; those of the first one end up in lmms-eval's results.

        Raises:
            ValueError: nothing was answered, and this process is the only one.
        """
        if tally.failed and not tally.answers and self.world_size == 1:  # others would wait
            raise ValueError(
                f"none of the {tally.failed} questions could be asked; the warnings above say why"
            )
        figures = tally.figures()
        log_metrics(tally.seconds, tally.tokens_out, tally.speed, figures)
        if tally.failed:
            logger.warning(
                f"{tally.failed} of {tally.failed + tally.answers} questions could not be asked "
                "and are scored as empty answers"
            )


def _batch_size(given: int | str) -> int:
    try:
        size = int(given)
    except ValueError:
        raise ValueError(f"batch_size={given}: must be a number, such as 8") from None
    check_positive("batch_size", size)
    return size


def _result(answer: Answer, asked: Asked) -> Any:
    text = cut(answer.answer, stop_strings(asked.settings))
    return GenerationResult(text, TokenCounts(answer.tokens_in, answer.tokens_out))
