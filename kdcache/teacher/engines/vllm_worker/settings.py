"""What the engine and its process in vLLM's environment agree on. Importing this costs nothing."""

from __future__ import annotations

VARIABLE = "KDCACHE_VLLM"
"""Environment variable with the architecture and the vocabulary size, which every process of vLLM's reads."""

REQUEST = "kdcache"
"""Name under which a request carries what is wanted of it."""

TASK = "token_embed"
"""The task of vLLM's that the requests have."""

TESTED = ("0.32",)
"""Versions of vLLM that the tests have run with."""

SETTINGS = {
    "max_num_batched_tokens": 0,
    "max_num_seqs": 0,
    "gpu_memory_utilization": 0.0,
    "kv_cache_memory_bytes": 0,
    "enable_prefix_caching": False,
    "enforce_eager": False,
    "batch_invariant": False,
    "quantization": "",
    "any_version": False,
    "timeout": 1800.0,
}
"""What `--engine-set` may set, with its type and default; 0 and the empty text leave the choice to vLLM."""
