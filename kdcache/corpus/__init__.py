"""Corpus: documents to packed rows, each shard from its own range of documents alone.

From files to records:

find_files.py     names, folders, globs and URLs to files, and what kind of file each is
file_bytes.py     the bytes of a file by place: local, behind a URL, or compressed
text_files.py     plain text and JSON lines, by byte
json_records.py   records of JSON, one at a time
tables.py         Parquet, Arrow and `datasets` tables, by row
open_source.py    what a user names as a corpus, to one of these
records.py        what a source gives for a document
reading_options.py  the options of a command that say how a corpus is read

From records to documents:

forms.py          which columns a corpus has, and what its documents are made of
record_form.py    a record to a document
messages.py       conversations out of the shapes in which people keep them
token_records.py  token ids, and the columns that say which of them count
documents.py      what a document may be, and why it cannot be used
sources.py        a corpus: its documents by address, and the filters

From documents to tokens:

chat_template.py  messages to the text that a teacher reads
answer_spans.py   where in that text each answer stands
exact_tokens.py   a text and its spans, to ids and which of them are taught
teacher_context.py  what a teacher reads where it is told more than its student
tokenise.py       any document to tokens

From tokens to shards:

rules.py          names of the rules by which documents become rows
packing.py        documents to rows
survey.py         one pass over a corpus, on all cores, that plans the shards of a cache
plan.py           the plan: which documents each shard holds, where they begin, and what they are
shards.py         the documents of a shard to its rows, and what was left out
"""
