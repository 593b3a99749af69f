"""The stack of blocks of a transformer, by its older place: everything is in `palimpsest.parts.decoder`."""

from palimpsest.parts.decoder import Stack, final_norm, parts_of, stack_of

__all__ = ["Stack", "final_norm", "parts_of", "stack_of"]
