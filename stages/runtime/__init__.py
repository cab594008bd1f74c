"""Contract, identity, sealing: how a stage runs, whatever it does.

May be imported from here: anything. Never comes in: what a stage computes; this room is left out of the code's
digest.
"""
