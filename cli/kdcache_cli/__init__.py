"""The command line of kdcache: the only place that prints."""
