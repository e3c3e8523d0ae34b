"""Demo: the whole story on a machine with no network and no GPU.

manuals.py  a corpus that every CPython carries
model.py    a small tokenizer and a small teacher, trained here
story.py    teacher, cache, two students from one start, one table, one plot
"""
