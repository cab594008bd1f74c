"""Products of thin matrices in place of maps, for `factorize` and `share`: ranks, products, looped blocks.

May be imported from here: anything, by these two. Never comes in: the algebra, which is in `stages.algorithms`.
"""
