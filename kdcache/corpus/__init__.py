"""Corpus: documents to packed rows, each shard from its own range of documents alone.

sources.py     a corpus: forms, columns, filters; its documents by address
open_source.py what a user may name as a corpus, to files that are read by address
find_files.py  a path, glob, folder or URL to its files, each with its kind
file_bytes.py  ranges of a file, on a disk, behind a URL or inside a compression
text_files.py  plain text and JSON, by byte
json_records.py  one JSON record to its wanted columns; where records stand in JSON text
tables.py      Parquet, Arrow and `datasets` tables, by row
records.py     what stands in a corpus for one document
survey.py      one pass over a corpus, on all cores, that plans the shards of a cache
plan.py        the plan: which documents each shard holds, where they begin, and what they are
tokenise.py    one document to tokens, and to the tokens that may be labels
packing.py     pieces to rows
shards.py      the documents of a shard to its rows
"""
