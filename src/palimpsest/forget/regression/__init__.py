"""Unlearning for networks with continuous outputs, one file per published system."""
