"""fuse: several checkpoints trained from one become one. `stage` is the verb, `merging` the way through the tensors.

May be imported from here: nothing, but for `STAGES`. Never comes in: the arithmetic, which is in `stages.algorithms`.
"""
