"""Planning: what a dump will take, from a sample of its corpus and a few measured batches.

sample.py             documents from all over the corpus, tokenised and packed
trial.py              a small cache in a temporary folder: what its rows take, in bytes and seconds
selections.py         the same rows under other selections, from the same logits
student_step.py       a training step from such a cache
memory.py             how much memory that takes, and how much there is
plan.py               all of it together, for the whole corpus
"""
