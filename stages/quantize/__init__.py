"""quantize: fewer bits.

`stage` is the verb; beside it what only it uses: the plan, rounding, ranges, rotation, the proof.

May be imported from here: nothing, but for `STAGES`. Never comes in: another verb, and the layers that loaders know.
"""
