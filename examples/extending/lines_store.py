"""A store outside the package: a shard is one text file, a line per row: crc32c, then streams in hexadecimal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from kdcache import register_store
from kdcache.errors import CorruptCacheError
from kdcache.store.row_format import Record, row_seal
from kdcache.store.shards import Shard, ShardWriter


class LinesWriter(ShardWriter):
    suffix, folder = ".jsonl", False

    def append(self, record: Record) -> None:
        if not self.tally.rows:
            self.sink = self.data.part("")
        text = json.dumps([record.positions, *(s.tobytes().hex() for s in record.streams.values())]).encode()
        self.sink.write(b"%08x %s\n" % (row_seal(self.shard, self.tally.rows, record.positions, [text]), text))

    def finish(self) -> list[dict[str, Any]]:
        return [(self.sink if self.tally.rows else self.data.part("")).record()]


class LinesShard(Shard):
    def open(self, objects: list[dict[str, Any]]) -> str:
        file, name = self.require(objects, objects[0]["name"]), str(objects[0]["name"])
        self.lines = file.read(0, file.size).splitlines(keepends=True)
        if len(objects) != 1 or len(self.lines) != self.rows:
            raise CorruptCacheError(f"{self.storage.path_of(name)} is not a shard of {self.rows} rows")
        return name

    def record(self, row: int) -> Record:
        seal, text = self.lines[row][:9], self.lines[row][9:-1]
        positions, *streams = json.loads(text)
        if seal != b"%08x " % row_seal(self.shard, row, positions, [text]):
            raise CorruptCacheError("its crc32c does not match")
        shapes = self.form.shapes(positions)
        found = {n: np.frombuffer(bytes.fromhex(s), shapes[n][0]) for n, s in zip(shapes, streams, strict=True)}
        return Record(positions=positions, streams=found)


register_store("lines", LinesWriter, LinesShard)
