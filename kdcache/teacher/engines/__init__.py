"""Engines: what runs a teacher.

base.py          the protocol, what an engine declares and gives, and the registry of engines by name
batch.py         packed rows as an engine is given them
transformers.py  a Hugging Face model in this process
tiled_head.py    the output head of such a model on its own, with the model's own code
"""
