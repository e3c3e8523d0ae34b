"""Benchmarks: programs that print what they measured, each figure next to that of a baseline from the same run."""
