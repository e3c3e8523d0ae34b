"""Store: what is on disk, and in which order it is written.

storage.py       the interface to a folder and to an object store; open_storage.py: the storage of a path or URL
local.py         a folder; remote.py: an object store; mirror.py: one with a bounded local copy
atomic_files.py  files that appear whole or not at all, create-only
sealed_json.py   JSON records that end with a checksum of themselves
manifest.py      kdcache.json: what the cache is
plan.py          plan.arrow: the documents of each shard
commit.py        commits/00007.json: the record that makes a shard exist; target_sums.py: the sums in it
heartbeat.py     running/00007.json: who makes a shard just now; pulse.py: keeps it fresh
shard_record.py  what commits and heartbeats have in common
commits.py       the commits of all shards, as columns; seal.py: seal.arrow, which holds them all
bad_records.py   documents that could not be used: as commits list them, and the file beside the seal
publish.py       how a cache comes into being, how a shard joins it, and what all shards hold together
row_format.py    a row, its targets and its extras as named streams
shards.py        what every store does alike with the rows of a shard
registry.py      the stores by name
arrow_store.py   shards/00007.arrow, one file; arrow_columns.py: its columns; arrow_layout.py: reading it without trust
zarr_store.py    shards/00007.zarr/, a group of arrays, one a stream
testing.py       an alias of kdcache.testing.store_conformance, the suite that every store passes
"""
