"""What other tools write, written here from the descriptions of their formats and without kdcache's code.

A row is (tokens [n], piece_lengths, ids [n, K], logprobs [n, K]): entries at every slot. Every writer gives the path of
the cache, and of a file of tokens where the format holds none.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import yaml
from safetensors.numpy import save

Row = tuple[np.ndarray, list[int], np.ndarray, np.ndarray]
Written = tuple[Path, Path | None]

VOCABULARY = 512
BITS = 9
DRAWS = 50


def tokens_file(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "tokens.jsonl"
    lines = [{"input_ids": row[0].tolist(), "piece_lengths": row[1]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def megatron(folder: Path, rows: Sequence[Row]) -> Written:
    """Version 1: two ranks, microbatches of one sample, two of them an iteration; float16, rows of one length."""
    out, ranks, micro = folder / "megatron", 2, 2
    out.mkdir()
    length, width = max(len(row[0]) for row in rows), rows[0][2].shape[1]
    values = np.full((len(rows) + (-len(rows)) % (ranks * micro), length, width), -1e4, np.float32)
    ids = np.full(values.shape, -1, np.int64)
    for i, (tokens, _, row_ids, logp) in enumerate(rows):
        values[i, : len(tokens)], ids[i, : len(tokens)] = logp, row_ids
    for rank in range(ranks):
        with tarfile.open(out / f"cp0_dp{rank}__{len(values) // 4 - 1}.tar", "w") as tar:
            put(tar, "_meta.json", b'{"hash": "x", "identifiers": {}, "saver": {"k": 12}}')
            for iteration in range(len(values) // (ranks * micro)):
                mine = [iteration * ranks * micro + m * ranks + rank for m in range(micro)]
                content = {
                    "values": [torch.from_numpy(values[i]).half()[:, None] for i in mine],
                    "indices_low": [torch.from_numpy((ids[i] & 0xFFFF).astype(np.uint16))[:, None] for i in mine],
                    "bit_17": [torch.from_numpy(ids[i] >> 16 != 0)[:, None] for i in mine],
                }
                buffer = io.BytesIO()
                torch.save(content, buffer)
                put(tar, f"{iteration}.pt.zst", pa.compress(buffer.getvalue(), codec="zstd", asbytes=True))
    return out, tokens_file(folder, rows)


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def distillkit(folder: Path, rows: Sequence[Row]) -> Written:
    """Differences, four exact, the others fitted by a line, with what is left in 12 bits."""
    out = folder / "distillkit"
    out.mkdir()
    width = rows[0][2].shape[1]
    others = width - 4
    config = {
        "d": VOCABULARY, "k": width, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1],
        "term_dtype": "float32", "delta_encoding": True, "error_diffusion": False, "normalize_t": False,
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 16, "num_elements": others}],
    }  # fmt: skip
    (out / "compression_config.yaml").write_text(yaml.safe_dump(config))
    records = []
    for tokens, _, ids, logp in rows:
        packed_ids, packed = [], []
        for slot in range(len(tokens) - 1):
            order = np.argsort(-logp[slot], kind="stable")
            packed_ids.append(bits([int(i) for i in ids[slot][order]], BITS))
            falling = logp[slot][order].astype(np.float64)
            steps = np.diff(falling, prepend=0.0)
            line = np.polyfit(np.arange(others), steps[4:], 1)[::-1].astype(np.float32)
            rest = steps[4:] - (line[0] + line[1] * np.arange(others, dtype=np.float32))
            scale = np.float32(max(np.abs(rest).max() / 2**15, 1e-12))
            levels = np.clip(np.round(rest / scale), -(2**15), 2**15 - 1).astype(int) + 2**15
            exact = steps[:4].astype(np.float32).tobytes() + line.tobytes() + scale.tobytes()
            packed.append(list(exact) + bits(levels.tolist(), 16))
        records.append({"input_ids": tokens.tolist(), "compressed_logprobs": packed, "bytepacked_indices": packed_ids})
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    for number, start in enumerate(range(0, len(records), 4)):
        table = pa.Table.from_pylist(records[start : start + 4], schema=schema)
        parquet.write_table(table, out / f"data_{number}.parquet")
    return out, None


def bits(numbers: Sequence[int], width: int) -> list[int]:
    """Numbers of some bits each, the highest first, as bytes."""
    text = "".join(format(number, f"0{width}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def topk_jsonl(folder: Path, rows: Sequence[Row]) -> Written:
    """What vLLM's server answers."""
    path = folder / "answers.jsonl"
    lines = []
    for tokens, _, ids, logp in rows:
        lists: list[Any] = [None]
        for slot in range(len(tokens) - 1):
            entries = {
                str(i): {"logprob": float(v), "rank": r, "decoded_token": "x"}
                for r, (i, v) in enumerate(zip(ids[slot], logp[slot], strict=True), 1)
            }
            if str(tokens[slot + 1]) not in entries:  # a server adds the token that stands there
                entries[str(tokens[slot + 1])] = {"logprob": float(logp[slot].min() - 1), "rank": len(entries) + 9}
            lists.append(entries)
        lines.append({"choices": [{"index": 0, "prompt_token_ids": tokens.tolist(), "prompt_logprobs": lists}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, None


def axolotl(folder: Path, rows: Sequence[Row]) -> Written:
    """A prepared data set."""
    path = folder / "axolotl.jsonl"
    lines = []
    for tokens, _, ids, logp in rows:
        width = ids.shape[1]
        target_ids = [list(range(width)), *ids[:-1].tolist()]
        target_logp = [[-1e9] * width, *logp[:-1].tolist()]
        mask = [[0] * width, *[[1] * width] * (len(tokens) - 1)]
        lines.append(
            {"input_ids": tokens.tolist(), "labels": tokens.tolist(), "target_token_ids": target_ids,
             "target_logprobs": target_logp, "target_mask": mask}
        )  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, None


def maxtext(folder: Path, rows: Sequence[Row]) -> Written:
    """Raw logits: log-probabilities and a constant of each slot. Batches of two; the last ones pickled."""
    import pickle

    path, records = folder / "teacher_top_k_global.array_record", []
    length = max(len(row[0]) for row in rows)
    for start in range(0, len(rows), 2):
        batch = rows[start : start + 2]
        record: dict[str, Any] = {
            "tokens": np.stack([pad(row[0].astype(np.int32), length) for row in batch]),
            "top_k_logits": np.stack(
                [pad((row[3] + np.sin(np.arange(len(row[3])))[:, None]).astype(np.float32), length) for row in batch]
            ),
            "top_k_indices": np.stack([pad(row[2].astype(np.int32), length) for row in batch]),
            "inputs_segmentation": np.stack(
                [pad(np.repeat(np.arange(1, 1 + len(row[1])), row[1]).astype(np.int32), length) for row in batch]
            ),
        }
        records.append(save(record) if start + 2 < len(rows) else pickle.dumps(record))
    path.write_bytes(array_record(records))
    return path, None


def pad(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1))


def array_record(records: Sequence[bytes]) -> bytes:
    """A Riegeli file of uncompressed simple chunks, one a record, and an index that only says where it begins."""
    out = bytearray()

    def write(data: bytes) -> None:
        for byte in range(0, len(data), 4096):
            part = data[byte : byte + 4096]
            while part:
                if len(out) % 65536 == 0:
                    out.extend(bytes.fromhex("83af70d10d884a3f") + bytes(16) if not out else bytes(24))
                room = 65536 - len(out) % 65536
                out.extend(part[:room])
                part = part[room:]

    def chunk(kind: bytes, data: bytes, count: int, size: int) -> None:
        header = struct.pack("<QQQQQ", 0, len(data), 0, count << 8 | kind[0], size)
        write(header + data)

    chunk(b"s", b"", 0, 0)
    for record in records:
        size = varint(len(record))
        chunk(b"r", b"\x00" + varint(len(size)) + size + record, 1, len(record))
    end = len(out)
    write(bytes(-len(out) % 65536))
    index = b"\x08" + varint(end) + b"\x10" + varint(0x71930E704FDAE05E)
    chunk(b"r", b"\x00\x01" + varint(len(index)) + index, 1, len(index))
    return bytes(out) + bytes(-len(out) % 65536)


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def sekd(folder: Path, rows: Sequence[Row], draws: Callable[[np.ndarray], np.ndarray] | None = None) -> Written:
    """Draws of 50 in 24 bits an entry; `draws` gives the shares of the entries of a slot, else they are drawn."""
    out, items, index = folder / "sekd", [], {}
    out.mkdir()
    random = np.random.default_rng(0)
    for i, (tokens, _, ids, logp) in enumerate(rows):
        packed = np.zeros((len(tokens) - 1, DRAWS, 3), np.uint8)
        for slot in range(len(tokens) - 1):
            p = np.exp(logp[slot].astype(np.float64))
            counts = random.multinomial(DRAWS, p / p.sum())
            q = np.round(counts / DRAWS * 127).astype(int) if draws is None else draws(counts)
            entries = [(int(id_), int(level)) for id_, level, count in zip(ids[slot], q, counts, strict=True) if count]
            for at in range(DRAWS):
                id_, level = entries[at] if at < len(entries) else (VOCABULARY, 0)
                packed[slot, at] = list((id_ | level << 17).to_bytes(3, "little"))
        key = hashlib.sha1(tokens.astype(np.int64).tobytes()).hexdigest()
        items.append(
            {"key": key, "valid_mask": torch.ones(len(tokens) - 1, dtype=torch.bool), "topk_m": 12,
             "cache_mode": "none",
             "rs": {"U": DRAWS, "N": DRAWS, "id_bits": 17, "prob_bits": 7, "sentinel_id": VOCABULARY,
                    "packed": torch.from_numpy(packed.reshape(-1))}}
        )  # fmt: skip
        index[key] = {"shard": 0, "index": i}
    torch.save(items, out / "shard_000000.pt")
    shards = [{"path": "shard_000000.pt", "n": len(items)}]
    (out / "manifest.json").write_text(json.dumps({"signature": {}, "items": index, "shards": shards}))
    return out, tokens_file(folder, rows[::-1])  # in another order: items are found by their keys
