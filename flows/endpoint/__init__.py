"""An engine behind OpenAI's HTTP interface: what clients ask is read and refused here, and answered by one batch.

May be imported from here: `server`, for `flows.commands`. Never comes in: how tokens are chosen or texts are written,
which is `stages.serving`'s; where a model lies, which the command finds out.
"""
