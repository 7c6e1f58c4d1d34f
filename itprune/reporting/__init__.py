"""Runs side by side: what they were, how they went and what differs between them.

    metrics      the figures of a training log, in a few numbers
    recorded     a training run, read from its folder
    scored       the output folder of `itprune compare` or `itprune eval`
    differences  recipe keys, software and data that are not the same
    summary      everything that is told, as plain values
    svg, charts  pictures of it, as text that stands inside the page
    render       the page

Training writes `RUN_FILE` (train/record.py); a folder without one is read by its trainer's log.
"""

RUN_FILE = "run.json"
"""The record of a run, in its output folder."""
STATE_FILE = "trainer_state.json"
"""The trainer's log, in the output folder of a finished run and in every checkpoint."""
