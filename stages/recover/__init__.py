"""recover: what was lost is learned again from the dense model.

`stage` is the verb; beside it student, teacher and loop.

May be imported from here: nothing, but for `STAGES`. Never comes in: another verb.
"""
