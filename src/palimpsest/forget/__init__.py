"""Unlearning: methods that make a trained model forget. Call the package itself: `palimpsest.forget(...)`."""

from palimpsest.core.callable_module import make_callable
from palimpsest.forget._apply import forget

__all__ = ["forget"]

make_callable(__name__, forget)
