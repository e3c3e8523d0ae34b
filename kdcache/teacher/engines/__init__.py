"""Engines: what runs a teacher. `transformers` is the first."""
