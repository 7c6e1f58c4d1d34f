"""GuardedTrainer: a Trainer that ends in order, whatever happens to it.

Its checkpoints count only once all of their files are there, older ones stay until then; a loss
that is no number stops the run before the optimizer's step; a request to stop is met with a
checkpoint at the end of the step; and every known fault becomes a sentence that names the step and
the last good checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from train.guards.complete import clear, last_complete, remove_old, seal
from train.guards.faults import (
    INTERRUPTED,
    Fault,
    damaged,
    first_line,
    forget_children,
    lost_peer,
    lost_worker,
    not_written,
)
from train.guards.health import Health, Verdict
from train.guards.progress import Progress, shown
from train.guards.stopping import StopRequest
from train.guards.watchdog import Watchdog, watch_modules
from train.model import base_of

FETCHING = "waiting for data"


class GuardedTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the guards of this module.

    Args:
        stop: a request to stop that the process may receive.
    """

    def __init__(self, *args: Any, stop: StopRequest | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places: Sequence[str] = ()
        self._seen: Sequence[str] = ()
        self.progress = Progress(self.args.process_index, lambda: self.places)
        self.health = Health(self.accelerator, scaled=self.args.fp16)
        self.stop = stop or StopRequest()
        self._stops = False

    # ------------------------------------------------------------------------- a step
    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        self.progress.step = self.state.global_step + 1
        self.progress.enter(FETCHING)
        found = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self.progress.enter("before the forward pass")
        return found

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.enter("counting the answer tokens of all processes")
        return super()._get_num_items_in_batch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.stop.interrupted:
            raise KeyboardInterrupt
        self._seen = self.places
        loss: Tensor = super().training_step(*args, **kwargs)
        self.health.add(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        verdict = self.health.judge(norm, stop=self.stop.signal is not None)
        if verdict.illness is not None:
            raise self._ill(verdict)
        self._stops = verdict.stop
        self.progress.enter("the optimizer's step")
        return norm

    def _ill(self, verdict: Verdict) -> Fault:
        mine = self.args.process_index in verdict.ranks
        places = gather_object(list(self.places) if mine else [])
        samples = f" (samples: {shown(places)})" if places else ""
        return Fault(
            f"step {self.progress.step}: {verdict.illness}{samples}; nothing of this step was kept "
            f"and {self._kept()}; look at the samples, then go on with a smaller "
            "trainer.max_grad_norm or start anew with a lower trainer.learning_rate",
            shared=True,
        )

    # ------------------------------------------------------------------------- checkpoints
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._stops:
            self.control.should_save, self.control.should_evaluate = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._stops:
            number = self.stop.signal or signal.SIGTERM
            raise Fault(
                f"stopped by {signal.Signals(number).name} after step {self.state.global_step}; "
                f"{self._kept()}",
                status=128 + number,
                shared=True,
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"checkpoint-{self.state.global_step}"
        self.progress.enter(f"saving {folder.name}")
        if self.args.should_save:
            clear(folder)  # what is left of it must not be taken for part of the new one
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
                remove_old(output, limit, self.state.best_model_checkpoint)
        except Exception:
            clear(folder)
            raise
        finally:
            self.args.save_total_limit = limit

    # ------------------------------------------------------------------------- faults
    @contextlib.contextmanager
    def guarded(self, lost: Callable[[str], None]) -> Iterator[None]:
        """Watches what runs inside and tells of its end.

        Args:
            lost: is told why the process is about to be ended where no exception can say so.

        Raises:
            Fault: in place of every exception that a sentence explains.
        """
        watchdog = Watchdog(self.progress, self.args.ddp_timeout, self.stop, self._kept, lost)
        remove = watch_modules(base_of(self.model), self.progress)
        self.stop.saves = True
        try:
            with watchdog:
                try:
                    yield
                except Fault:
                    raise
                except (Exception, KeyboardInterrupt) as error:
                    forget_children()
                    self.progress.moved = time.monotonic()
                    self._explain(error, watchdog)
                    raise
        except BaseException:
            self._close_reports()
            raise
        finally:
            self.stop.saves = False
            remove()

    def _explain(self, error: BaseException, watchdog: Watchdog) -> None:
        """Raises a Fault for an exception that is known; tells others what is kept."""
        kept = self._kept()
        if isinstance(error, KeyboardInterrupt):
            raise Fault(f"interrupted in {self.progress}; {kept}", INTERRUPTED, True) from error
        if lost_worker(error, fetching=self.progress.doing == FETCHING):
            raise Fault(
                f"a data worker died in {self.progress} ({first_line(error)}); it may have run out "
                f"of memory (fewer data.workers need less) or met a broken file after "
                f"{shown(self.places or self._seen) or 'the start'}; {kept}"
            ) from error
        if lost_peer(error):
            lost = first_line(error).partition(". ")[0].rpartition("] ")[2]
            raise Fault(f"lost another process ({lost}): {watchdog.where()}; {kept}") from error
        if damaged(error) and not self.progress.step:
            raise Fault(
                f"a file of the checkpoint cannot be read ({first_line(error)}); move its folder "
                "away, and the run goes on from the one before it"
            ) from error
        reason = not_written(error, Path(self.args.output_dir))
        if reason is not None:
            raise Fault(f"{self.progress}: {reason}; {kept}") from error
        if not isinstance(error, ValueError):
            error.add_note(f"in {self.progress}; {kept}")

    def _kept(self) -> str:
        last = last_complete(Path(self.args.output_dir))
        if last is None:
            return "there is no complete checkpoint yet"
        return f"the last complete checkpoint is {last}, from which the same command goes on"

    def _close_reports(self) -> None:
        """A curve is looked at when a run has failed: what its writers still hold goes to disk."""
        kinds = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, kinds):
                with contextlib.suppress(Exception):
                    callback.on_train_end(self.args, self.state, self.control)
