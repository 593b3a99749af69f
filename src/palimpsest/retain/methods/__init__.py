"""Learners, one file per published method."""
