"""The former name of `kdcache.testing.store_conformance`; kept as an alias."""

from kdcache.testing.store_conformance import *  # noqa: F403
