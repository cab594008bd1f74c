"""Promotion: the append-only journal, its projection into MLflow's registry, the package and the card of a version.

May be imported from here: the journal and its projection. Never comes in: gates; a candidate comes with its verdict.
"""
