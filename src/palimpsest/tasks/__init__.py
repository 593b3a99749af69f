"""Domains: what a method must know of data and models, one file each."""

from palimpsest.tasks.classification import Classification

__all__ = ["Classification"]
