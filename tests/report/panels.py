"""Panels of the report that a plain study of classifiers has nothing to show in."""

ELSEWHERE = ("turns", "muse", "answers")
