"""Continual learning: learners that retain what they know while they learn."""

from palimpsest.retain.learner import LEARNERS, Keeps, Learner, build_learner, learner
from palimpsest.retain.running import Outcome, Run, learn
from palimpsest.retain.short_form import parse_stream
from palimpsest.retain.streams import Experience, Stream
from palimpsest.retain.student import Student, Training

__all__ = [
    "LEARNERS",
    "Experience",
    "Keeps",
    "Learner",
    "Outcome",
    "Run",
    "Stream",
    "Student",
    "Training",
    "build_learner",
    "learn",
    "learner",
    "parse_stream",
]
