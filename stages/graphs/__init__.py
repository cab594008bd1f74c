"""ONNX graphs without torch: reading, editing, lowering to ONNX Runtime, checks of what became of them.

May be imported from here: anything, by `export`, `compile` and the command `export-to`. Never comes in: torch; the
TensorRT image has none.
"""
