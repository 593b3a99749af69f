"""Continual learning: learners that retain what they know while they learn."""
