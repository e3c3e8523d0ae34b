"""Records of one shard: small sealed objects that name the shard and the cache that they belong to."""

from __future__ import annotations

from typing import Protocol, TypeVar

from kdcache.errors import CorruptCacheError
from kdcache.store.manifest import FORMAT
from kdcache.store.sealed_json import read_record, require_fields, short
from kdcache.store.storage import Storage


class ShardRecord(Protocol):
    """A dataclass whose fields are those of the record."""

    @property
    def shard(self) -> int:
        """The number of the shard."""

    @property
    def manifest_sha256(self) -> str:
        """Of the cache that it belongs to."""

    def require_sound(self) -> None:
        """Check what the types of its fields do not say.

        Raises:
            ValueError, OverflowError, CorruptCacheError: it is not sound.
        """


R = TypeVar("R", bound=ShardRecord)


def read_shard_record(
    record: type[R], storage: Storage, name: str, most: int, shard: int, manifest_sha256: str
) -> R | None:
    """Read and check the record of a shard; None if there is none.

    Args:
        record: its dataclass, whose name in lower case is what messages call it.
        name: its object, of at most `most` bytes.
        shard, manifest_sha256: what it must belong to.

    Raises:
        CorruptCacheError: damaged, or of another shard or cache.
    """
    path, kind = storage.path_of(name), record.__name__.lower()
    try:
        fields = read_record(storage, name, most)
    except FileNotFoundError:
        return None
    form = fields.pop("format", None)
    del fields["checksum"]
    try:
        if type(form) is not int or form != FORMAT:
            raise ValueError(f"it is of format {short(repr(form))}")
        require_fields(fields, record)
        found = record(**fields)
        found.require_sound()
    except (ValueError, OverflowError, CorruptCacheError) as error:
        raise CorruptCacheError(f"{path} is no sound {kind}: {error}") from None
    if found.shard != shard or found.manifest_sha256 != manifest_sha256:
        raise CorruptCacheError(f"{path} is the {kind} of another shard or of another cache")
    return found
