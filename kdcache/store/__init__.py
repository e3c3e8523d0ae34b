"""Store: what lies on disk, and in which order it gets there.

storage.py       where a cache lies, with one set of verbs; open_storage.py finds it by path or URL
local.py         a folder; remote.py: an object store; mirror.py: one of which a bounded local copy is kept
atomic_files.py  files that appear whole or not at all, create-only
sealed_json.py   JSON records that end with a checksum of themselves
manifest.py      kdcache.json: what the cache is
commit.py        commits/00007.json: the record that makes a shard exist
publish.py       how a cache comes into being, and how a shard joins it
row_format.py    a row, its targets and its extras as named streams
shards.py        what every store does alike with the rows of a shard
registry.py      the stores by name
arrow_store.py   shards/00007.arrow, one file; arrow_columns.py: its columns; arrow_layout.py: reading it without trust
zarr_store.py    shards/00007.zarr/, a group of arrays, one a stream
"""
