"""Testing: what tests of kdcache and of its extensions share: example rows and the conformance suite of a store."""
