"""Audits that change copies of the models: does the forgotten come back?"""
