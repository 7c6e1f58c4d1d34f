"""Bench: what pruning is worth on this machine, in one run with its own control.

`shape` says what a random model and its input are, `shapes` lists them, `variants` says what is
compared, `timing` and `counting` measure, `turns` sets the order, `train`, `infer`, `answers`,
`methods` and `serving` put them together, `table` prints. `crowd` makes the requests of `serving`,
and `front` sends them through the endpoint. Everything is compared with the dense model of the same
run, and with what the FLOPs of that run promise.
"""

from itprune.bench.answers import bench_eval
from itprune.bench.infer import bench_infer
from itprune.bench.methods import bench_methods
from itprune.bench.shapes import SHAPES
from itprune.bench.train import bench_train

__all__ = ["SHAPES", "bench_eval", "bench_infer", "bench_methods", "bench_train"]
