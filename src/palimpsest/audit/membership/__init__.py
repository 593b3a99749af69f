"""Membership inference (checklist A6): does a model still behave as if it had been trained on a record?"""
