"""Chains of commands, written down in a TOML file.

config.py   the options of `distil`
recipe.py   the file: stages, what they wait for, rounds
options.py  the options of a stage, checked before anything runs
run.py      one stage after the other, in processes of their own; what stands is skipped
"""
