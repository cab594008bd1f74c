"""export: a checkpoint to ONNX. `stage` is the verb; beside it the way there and its checks.

May be imported from here: nothing, but for `STAGES`. Never comes in: what a backend wants of a graph, which `compile`
does.
"""
