"""Teacher: the forward pass that runs once, and the loop that writes what it leaves behind.

config.py   what a dump is asked to do
worker.py   which share of the shards is mine
forward.py  packed rows to sparse targets
dump.py     shard by shard: rows, forward pass, commit
"""
