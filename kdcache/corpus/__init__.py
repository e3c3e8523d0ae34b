"""Corpus: documents to packed rows, each shard from its own range of documents alone.

sources.py     what a corpus may be: forms, columns, filters; its documents by address
text_files.py  plain text and JSON lines, by byte
tables.py      Parquet, Arrow and `datasets` tables, by row
survey.py      one pass over a corpus, on all cores, that plans the shards of a cache
plan.py        the plan: which documents each shard holds, where they begin, and what they are
tokenise.py    one document to tokens, and to the tokens that may be labels
packing.py     pieces to rows
shards.py      the documents of a shard to its rows
"""
