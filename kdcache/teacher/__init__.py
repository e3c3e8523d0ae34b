"""Teacher: the forward pass that runs once, and the loop that writes what it leaves behind.

config.py   what a dump is asked to do
inputs.py   what a shard is a function of, opened and fingerprinted
head.py     the output head, a tile of positions at a time
beside.py   encoding and writing, beside the forward pass
forward.py  packed rows to sparse targets
pilot.py    what must be known before the first shard
dump.py     shard by shard: rows, forward pass, commit
"""
