"""Unlearning: methods that make a trained model forget. Call the package itself: `palimpsest.forget(...)`."""

from palimpsest.core.callable_module import make_callable
from palimpsest.forget._apply import build_unlearner, forget, needs_met

__all__ = ["build_unlearner", "forget", "needs_met"]

make_callable(__name__, forget)
