"""Store: what lies on disk, and in which order it gets there.

place.py        where a cache lies, with one set of verbs; places.py finds the place of a path or URL
local.py        a folder; remote.py: an object store; mirror.py: one of which a bounded local copy is kept
ahead.py        work begun in threads before it is asked for; recent.py: what was asked for last
durable.py      files that appear whole or not at all, create-only
record.py       JSON records that end with a checksum of themselves
manifest.py     kdcache.json: what the cache is
commit.py       commits/00007.json: the record that makes a shard exist
create.py       how a cache comes into being, and how a shard joins it
shards.py       what every store does alike; row_format.py: a row as named streams
arrow_store.py  shards/00007.arrow: the rows of a shard, one file
zarr_store.py   shards/00007.zarr/: the same, one array a stream
testing.py      the suite that every store passes
"""
