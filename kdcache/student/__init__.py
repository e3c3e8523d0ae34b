"""Student: everything that learns from a cache. Nothing here imports the teacher's side.

config.py       what a training run is asked to do
choice.py       what --rows and --where say
sources.py      the caches of a run, their weights, and whether they can be mixed
teachers.py     caches of several teachers over the same rows, read as one
split.py        which rows are trained on and which are measured on
mixture.py      one sequence of rows out of several caches
data.py         rows of caches as batches, the order of a run, the rows held out
model.py        a student from a checkpoint, a hub name or a config.json
measure.py      figures over rows: nll, kl, agreement
checkpoints.py  checkpoints that exist whole or not at all
readers.py      processes that read batches ahead
waiting.py      the share of the time that the step waited for rows
lines.py        JSON lines that a run appends to and cuts back
record.py       what a run is, so that it is gone on with as itself
ranks.py        what the processes of a run tell each other
head.py         body, output head and loss in one forward pass
schedule.py     the objective of each step
trainer.py      transformers.Trainer with our loss and our order of rows
train.py        one run, from a cache to a checkpoint
"""
