"""Benchmarks: programs that print what they measured, each figure beside its rival's from the same run."""
