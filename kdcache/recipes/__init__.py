"""Chains of commands, written down in a TOML file.

recipe     the file: stages, what they wait for, rounds
options    the options of a stage, checked before anything runs
run        one stage after the other, in processes of their own; what stands is skipped
"""
