"""Measure one artifact on one corpus or set of items, on one executor.

May be imported from here: the stage's definition and its params. Never comes in: gates, and what is compared later.
"""
