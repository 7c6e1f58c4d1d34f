"""Bayesian search of one number, for methods that are calibrated by trying.

optuna does it (tree-structured Parzen estimator, seeded) and is an extra dependency, imported only
when something is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def maximise(
    score: Callable[[float], float],
    low: float,
    high: float,
    trials: int,
    seed: int,
    first: Sequence[float] = (),
    log: bool = False,
) -> float:
    """The best of `trials` tried values of one number.

    Args:
        score: value -> how good it is.
        low, high: the range, ends included.
        trials: how often `score` is called.
        seed: the same seed and scores try the same values.
        first: values tried before the search chooses its own.
        log: search on a logarithmic scale.

    Raises:
        ValueError: optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(trials // 3, 1))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for value in first:
        study.enqueue_trial({"value": value})
    study.optimize(lambda t: score(t.suggest_float("value", low, high, log=log)), n_trials=trials)
    return float(study.best_params["value"])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "this calibration searches with optuna, which is not installed; "
            "run `pip install itprune[search]`"
        ) from None
    return optuna
