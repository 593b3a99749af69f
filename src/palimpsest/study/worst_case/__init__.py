"""Worst-case forget sets: search for the records that are hardest to forget, and what methods make of them."""

from palimpsest.study.worst_case.baselines import BASELINES, Chooser
from palimpsest.study.worst_case.evaluation import Evaluator, summary
from palimpsest.study.worst_case.record import WorstCase
from palimpsest.study.worst_case.search import Search, worst_case

__all__ = ["BASELINES", "Chooser", "Evaluator", "Search", "WorstCase", "summary", "worst_case"]
