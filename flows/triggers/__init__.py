"""What starts a run without a person: new checkpoints in a folder or bucket, moved aliases, MLflow's webhooks.

May be imported from here: the watchers, for `flows.commands`. Never comes in: what a run does once it has started,
which is `flows.pipeline`'s.
"""
