"""Report: what a cache holds and what a student learned, as plain values for any surface to show.

inspect.py            a summary, a row, a position
evaluate.py           figures of one student or of several, side by side; an evaluation as a file
live_teacher.py       figures that need the cache's own teacher, run live on the same rows as a student
prompt.py             the next tokens after a text, of teacher and students
faithfulness.py       whether a cache holds what its teacher gives
status.py             how far a dump is, who works on it, and what failed
audit.py              what is wrong with the targets of anyone's cache:
compared_rows.py        what a teacher gives at their slots, and one before and after
audit_checks.py         what these rows say together
"""
