"""The pages of an embedded store: Prefect's and MLflow's servers on its databases, and its run records in Prefect.

A run never needs them: they read what its record says, and may be opened before, beside and after it.

May be imported from here: `servers`, for `flows.commands`. Never comes in: what a run does, which is
`flows.pipeline`'s; a team's server, which is `flows.production`'s.
"""
