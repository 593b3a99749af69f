"""Pieces that many systems share."""
