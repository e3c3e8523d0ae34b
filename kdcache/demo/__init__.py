"""Demo: the whole story on a machine with two cores and no GPU.

manuals.py  a corpus that every CPython carries
smollm2.py  a pre-trained teacher, fetched by pip and kept
model.py    a small tokenizer and a small teacher, trained here
lesson.py   teacher, student at its start and corpus: of the one or of the other
stages.py   how long each stage took, and what is left of the budget
story.py    the cache, two students from one start, one table, one plot
"""
