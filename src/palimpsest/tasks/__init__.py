"""Domains: what a method must know of data and models, one file each."""

from palimpsest.tasks.classification import Classification
from palimpsest.tasks.language import Language
from palimpsest.tasks.registry import TASKS, build_task
from palimpsest.tasks.regression import Regression

__all__ = ["TASKS", "Classification", "Language", "Regression", "build_task"]
