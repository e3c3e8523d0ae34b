"""Doctor: what of this machine works with kdcache.

machine.py    versions, cores, memory, devices, the speed of a disk
access.py     whether a cache could be written to a place, and read from there
self_test.py  a dump, a verification and a training, all tiny
examine.py    all of it, and what is wrong
"""
