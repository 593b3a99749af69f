"""Unlearning for classifiers, one file per published system."""
