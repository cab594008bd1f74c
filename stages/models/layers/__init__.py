"""Layers that stand for linear maps and caches: quantized, low-rank, sparse, rounded.

May be imported from here: anything. Never comes in: how their values were chosen.
"""
