"""One pass over the blocks of a model, block after block: calls, activations, sites and their moments, compression.

May be imported from here: anything, by the verbs and by `low_rank`. Never comes in: what is done at a site, which is
a technique of a verb.
"""
