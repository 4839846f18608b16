"""Kernel benchmarks: every figure is a ratio against dense attention measured in the same run."""
