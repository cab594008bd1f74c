"""items: what a model is asked, as a set of items with its splits.

`stage` is the verb; beside it rows of a person's own files as items, and `abilities`, the set that ships.

May be imported from here: nothing, but for `STAGES`. Never comes in: another verb, torch, what scores an answer.
"""
