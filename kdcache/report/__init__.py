"""Report: what a cache holds and what a student learned, as plain values for any surface to show.

inspect.py            a summary, a row, a position
evaluate.py           figures of one student or of several, side by side
live.py               what only a live teacher can tell of them
prompt.py             what teacher and students hold to come next
evaluation_record.py  an evaluation as a file
faithfulness.py       whether a cache says what its teacher says
plots.py              held-out curves of several students
"""
