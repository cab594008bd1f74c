"""One step to its sealed artifact: planned, ordered, started as a child, in a container or in parts, and recorded.

May be imported from here: sessions and plans, for `flows.pipeline`; records of runs, for `flows.commands`. Never
comes in: verdicts, the registry, and anything that knows what a stage computes.
"""
