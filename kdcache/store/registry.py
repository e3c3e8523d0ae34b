"""Registry: the stores by name, those of this package and those that are added.

A store keeps the rows of a shard as objects; a cache's manifest names the one that it uses. Whoever adds one registers
it before a cache of it is written or opened, and runs `kdcache.testing.store_conformance` on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kdcache.errors import ConfigError
from kdcache.registry import Registry
from kdcache.store.arrow_store import ArrowShard, ArrowShardWriter
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.zarr_store import ZarrShard, ZarrShardWriter


@dataclass(frozen=True)
class Store:
    """How the shards of a cache are written and read."""

    writer: type[ShardWriter]
    reader: type[Shard]


registered_stores: Registry[Store] = Registry("store")


def register_store(name: str, writer: type[ShardWriter], reader: type[Shard]) -> None:
    """Add a store, so that manifests and `store=` may name it.

    Args:
        name: of lower-case letters, digits and `_`; as it is in manifests.
        writer: makes its shards.
        reader: reads them.

    Raises:
        ConfigError: a name that is taken or has other characters, or classes that are no writer and reader.
    """
    if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
        raise ConfigError(f"{name[:50]!r} cannot name a store; a name has 1 to 32 characters of a-z 0-9 _")
    if not (isinstance(writer, type) and issubclass(writer, ShardWriter)):
        raise ConfigError(f"store {name} cannot be registered: its writer is not a ShardWriter")
    if not (isinstance(reader, type) and issubclass(reader, Shard)):
        raise ConfigError(f"store {name} cannot be registered: its reader is not a Shard")
    registered_stores.register(name, Store(writer, reader))


def store_names() -> tuple[str, ...]:
    """Names of the stores that are registered."""
    return registered_stores.names()


def find_store(name: str) -> Store:
    """The store of this name.

    Raises:
        ConfigError: there is none.
    """
    return registered_stores.find(name)


register_store("arrow", ArrowShardWriter, ArrowShard)
register_store("zarr", ZarrShardWriter, ZarrShard)
