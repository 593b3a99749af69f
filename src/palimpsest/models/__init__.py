"""Reference networks by name. Users bring their own."""

from palimpsest.models.registry import MODELS, build_model

__all__ = ["MODELS", "build_model"]
