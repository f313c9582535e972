"""Measurements, never tests: hpcpipe beside JAX and PyTorch on the same cores, in one run. See docs/benchmarks.md."""
