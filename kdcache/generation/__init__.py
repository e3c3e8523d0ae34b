"""Generation: a corpus of text that a model writes, which `dump-teacher` reads as any other.

options.py   what is asked for, as options of the command
prompts.py   prompts as token ids, in shards
draw.py      logits to a token, and the log-probability of the distribution that it was drawn from
writer.py    a model that is open, and what it writes behind a batch of prompts
corpus_maker.py  the shards of a corpus, each a file
corpus_worker.py  a worker of `--launch`
generate.py  all of it, by one process or by several

Guarantee: a file is a function of (prompts, shard, seed, writer) and of nothing else, on one machine. A process that is
killed leaves whole files; the same command makes the missing ones.
"""
