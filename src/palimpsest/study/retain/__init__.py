"""Studies of continual learning: methods x streams x seeds, resumable in the middle of a stream."""

from palimpsest.study.retain.recipe import RetainRecipe, load_retain_recipe
from palimpsest.study.retain.result import RetainCell, RetainResult
from palimpsest.study.retain.verb import open_retain, retain

__all__ = ["RetainCell", "RetainRecipe", "RetainResult", "load_retain_recipe", "open_retain", "retain"]
