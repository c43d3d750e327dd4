"""Benchmarks: ours beside the alternative in one run, as ratios. `make bench`, or `make bench ARGS=count`."""
