"""`python -m kdcache_cli` is `kdcache`."""

from kdcache_cli.main import run

run()
