"""prune: fewer channels, heads, blocks, dimensions, or more zeros.

`stage` is the verb; a file beside it for each structure.

May be imported from here: nothing, but for `STAGES`. Never comes in: another verb, and the pass over the blocks.
"""
