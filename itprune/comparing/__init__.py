"""Method against method on one model, one data set and one clock.

    entries    what is compared: methods with options, budgets, seeds
    data       samples with answers, and a disjoint share to calibrate on
    subject    one model that wears one pruner at a time
    answering  accuracy and tokens of one case
    timing     prefill and training step of all cases, in turns
    rows       DIR/rows.jsonl: finished cases, so that a run goes on where it stopped
    run        the order of it all
    summary    rows become lines of a table: seeds joined, intervals, ratios to dense
    tables     CSV, JSON, Markdown
    curves     how methods are drawn, here and by `itprune eval`
    plot       accuracy over budget and over time

No table is made without `dense`, `random` and `downsample`: a method that does not beat a random
choice or a smaller picture has shown nothing.
"""
