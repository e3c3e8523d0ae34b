"""A crew: workers that one command starts, each of which makes shards that the driver names.

tasks.py      what a worker is asked to do and answers, and the class that workers are made from
assign.py     the driver: who makes which shard, and what happens when one dies
processes.py  workers that are processes of this machine, each with its share of the cores and GPUs
actors.py     workers that are actors of a Ray cluster
launch.py     the crew of either kind that `--launch` names

`dump-teacher` and `generate` share this.
"""
