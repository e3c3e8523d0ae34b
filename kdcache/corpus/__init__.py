"""Corpus: documents to packed rows, each shard from its own range of documents alone.

sources.py    what a corpus may be, read through `datasets`; its content fingerprint; filters
tokenise.py   one document to tokens, and to the tokens that may be labels
packing.py    pieces to rows
shards.py     a range of documents to the rows of one shard
"""
