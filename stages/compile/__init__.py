"""compile: a graph becomes an engine. `stage` is the verb, `processor` builds and proves what is executed here.

May be imported from here: nothing, but for `STAGES`. Never comes in: torch, and how a graph is written for a builder,
which is in `stages.graphs`.
"""
