"""A benchmark on one checkpoint, dense and on fewer tokens: what `itprune eval` does.

    settings   what an evaluation runs on, and its fingerprint
    questions  a task's items as samples; some set aside to calibrate on
    answers    DIR/answers/RUN/CASE.jsonl: every answer, kept when a run stops and goes on
    claim      one call at a time in the folder of a run
    asking     the share of one process in the answers of one case
    bootstrap  how sure one can be of a total
    summary    answers become lines of a table: seeds joined, intervals, ratios to dense
    runs       the summaries of a folder, which several calls share
    tables     JSON, CSV, Markdown
    plot       the headline figure over tokens and over answers per second
    run        the order of it all

Cases, models and calibration are those of `itprune.comparing`; benchmarks those of `itprune.tasks`.
"""
