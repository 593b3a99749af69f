"""Audits: what a model still knows, and what forgetting cost. Call the package: `palimpsest.audit(...)`."""

from palimpsest.audit._apply import audit, examine
from palimpsest.core.callable_module import make_callable

__all__ = ["audit", "examine"]

make_callable(__name__, audit)
