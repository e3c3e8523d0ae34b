"""Write a cache from a teacher that torch does not run: tokens and numpy logits in, a cache out.

    python examples/numpy_teacher.py CACHE 0/2 &  python examples/numpy_teacher.py CACHE 1/2

Any number of processes may run, be killed and be started again: each writes the shards that are missing. Replace
`logits_of` by your own model (JAX, Megatron, a server), and `rows_of` by your own token ids.
"""

import sys

import numpy as np
import torch

from kdcache import Selection, create_cache, select

VOCAB, LENGTH, SHARDS, ROWS = 256, 128, 24, 16
TEMPERATURES, SELECTION = (1.0, 2.0), Selection(kind="topk", k=8)
WEIGHTS = np.random.default_rng(7).normal(0, 3, (VOCAB, VOCAB)).astype(np.float32)


def rows_of(shard):
    return np.random.default_rng(shard).integers(0, VOCAB, (ROWS, LENGTH))  # [rows, L]


def logits_of(tokens):
    return WEIGHTS[tokens] + 0.3 * WEIGHTS[np.roll(tokens, 1)]  # [L, VOCAB], a teacher whose context is two tokens


def main(path, worker="0/1"):
    index, count = map(int, worker.split("/"))
    writer = create_cache(
        path, vocab_size=VOCAB, seq_len=LENGTH, selection=SELECTION, temperatures=TEMPERATURES, shards=SHARDS,
        teacher="numpy-bigram-7", corpus="random bytes", precision="float16",
    )  # fmt: skip
    for number in (shard for shard in writer.missing() if shard % count == index):
        with writer.shard(number) as shard:
            for tokens in rows_of(number):
                labels = torch.from_numpy(np.append(tokens[1:], -100))
                logits = torch.from_numpy(logits_of(tokens))
                shard.write(tokens, select(logits, SELECTION, labels=labels, temperatures=TEMPERATURES))
    return writer.finish()


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
