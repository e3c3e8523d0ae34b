"""Teacher: a model that runs once over a corpus, and the loop that writes its targets into a cache.

config.py             the options of a dump
inputs.py             what a shard is a function of, opened and fingerprinted
engines/              what runs a teacher, by name; `transformers` is the first
open_teacher.py       how every teacher is opened
opened_teacher.py     an open teacher: from what its engine gives to targets
pilot.py              what must be known before the first shard
background_writer.py  the thread that encodes and writes while the device computes
dump.py               shard by shard: rows, targets, commit
"""
