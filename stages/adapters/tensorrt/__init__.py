"""TensorRT: plans built in this process and in a child of it, and the GPU's memory.

May be imported from here: anything, by the backends and what executes their plans. Never comes in: what a backend means
by an engine.
"""
