"""Report: what a cache holds and what a student learned, as plain values for any surface to show.

inspect.py   a summary, a row, a position
evaluate.py  a student's figures over a cache, with the live teacher if asked
plots.py     curves
"""
