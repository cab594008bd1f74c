"""Scores of predictions: perplexity, divergence, sizes, and their intervals.

May be imported from here: anything. Never comes in: gates, and what executes the model.
"""
