"""Store: what lies on disk, and in which order it gets there.

durable.py      files that appear whole or not at all, create-only
record.py       JSON records that end with a checksum of themselves
manifest.py     kdcache.json: what the cache is
commit.py       commits/00007.json: the record that makes a shard exist
arrow_store.py  shards/00007.arrow: the rows of a shard
"""
