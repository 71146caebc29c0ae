"""Experiments at scale, and the benchmarks behind the figures in the docs."""
