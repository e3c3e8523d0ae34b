"""Teacher: a model that runs once over a corpus, and the loop that writes its targets into a cache.

config.py             the options of a dump
inputs.py             what a shard is a function of, opened and fingerprinted
engines/              what runs a teacher, by name
open_teacher.py       how every teacher is opened
opened_teacher.py     an open teacher: from what its engine gives to targets
pilot.py              what must be known before the first shard
background_writer.py  the thread that encodes and writes while the device computes
dump.py               a whole dump: the shards that have no commit, one after the other
shard_maker.py        one shard: rows, targets, commit
prefixed_rows.py      the rows of a teacher that reads more than its student
tensor_group.py       the processes that hold one teacher together
launch.py             a dump by this process, or by workers that one command starts
shard_worker.py       what such a worker does
check_data.py         what a corpus becomes, without running the teacher
reuse.py              what other caches hold of the same teacher, copied:
context_index.py        where each context of a cache is, found by its content
missing_rows.py         what the teacher must still run of a shard
mixed_shard.py          rows whose contexts are partly copied
"""
