"""Checkpoints of other programs, both ways: nanochat's .pt layout and transformers' NanoChat."""

from nanojax.interop.convert import Imported, as_dtype, load, to_run

__all__ = ["Imported", "as_dtype", "load", "to_run"]
