"""Testing: what tests of kdcache and of its extensions share.

example_rows.py       small manifests, rows of every sort, and whole caches of them
store_conformance.py  the suite that every store passes
"""
