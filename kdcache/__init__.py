"""kdcache: run a teacher once, keep a small sparse target for every token, train any number of students.

Names are imported when they are first used, so `import kdcache` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache import Cache, Row, open_cache
    from kdcache.cache_writer import CacheWriter, create_cache
    from kdcache.errors import KdcacheError
    from kdcache.extras import ExtraSpec
    from kdcache.known import Known
    from kdcache.losses import Pool, linear_lse_gather, register_divergence, sparse_kd_loss, sparse_kd_loss_from_logits
    from kdcache.prefixes import Prefix
    from kdcache.selection import Selection, register_kind, select
    from kdcache.store.registry import register_store
    from kdcache.targets import SparseTargets
    from kdcache.teacher.engines.base import register_engine
    from kdcache.verify import verify_cache

__version__ = "0.2.0"

__all__ = [
    "Cache",
    "CacheWriter",
    "ExtraSpec",
    "KdcacheError",
    "Known",
    "Pool",
    "Prefix",
    "Row",
    "Selection",
    "SparseTargets",
    "create_cache",
    "linear_lse_gather",
    "open_cache",
    "register_divergence",
    "register_engine",
    "register_kind",
    "register_store",
    "select",
    "sparse_kd_loss",
    "sparse_kd_loss_from_logits",
    "verify_cache",
]

_HOMES = {
    "Cache": "cache",
    "CacheWriter": "cache_writer",
    "ExtraSpec": "extras",
    "KdcacheError": "errors",
    "Known": "known",
    "Pool": "losses",
    "Prefix": "prefixes",
    "Row": "cache",
    "Selection": "selection",
    "SparseTargets": "targets",
    "create_cache": "cache_writer",
    "linear_lse_gather": "losses",
    "open_cache": "cache",
    "register_divergence": "losses",
    "register_engine": "teacher.engines.base",
    "register_kind": "selection",
    "register_store": "store.registry",
    "select": "selection",
    "sparse_kd_loss": "losses",
    "sparse_kd_loss_from_logits": "losses",
    "verify_cache": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kdcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
