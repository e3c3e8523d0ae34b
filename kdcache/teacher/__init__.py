"""Teacher: the forward pass that runs once, and the loop that writes what it leaves behind.

config.py  what a dump is asked to do
worker.py  which share of the shards is mine
dump.py    shard by shard: rows, forward pass, selection, commit
"""
