"""Measure how fast one artifact answers, beside its baseline, on one device.

May be imported from here: the stage's definition and its params. Never comes in: gates, and figures of another device.
"""
