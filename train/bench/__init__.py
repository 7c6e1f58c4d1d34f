"""Measures of training on this machine: `python -m train.bench.batching`, `….scale`."""
