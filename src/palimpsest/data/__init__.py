"""Data sources, one file each; every one returns `Records`."""

from palimpsest.data.registry import DATASETS, load_data, parse_data

__all__ = ["DATASETS", "load_data", "parse_data"]
