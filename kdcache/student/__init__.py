"""Student: everything that learns from a cache. Nothing here imports the teacher's side.

config.py       what a training run is asked to do
data.py         rows of a cache as batches, the order of a run, the rows held out
model.py        a student from a checkpoint, a hub name or a config.json
measure.py      figures over rows: nll, kl, agreement
checkpoints.py  checkpoints that exist whole or not at all
readers.py      processes that read batches ahead
head.py         body, output head and loss in one forward pass
schedule.py     the objective of each step
trainer.py      transformers.Trainer with our loss and our order of rows
train.py        one run, from a cache to a checkpoint
"""
