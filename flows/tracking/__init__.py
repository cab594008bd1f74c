"""MLflow: the connection, runs and their steps, metrics in batches.

May be imported from here: anything. Never comes in: the registry of models, which is `flows.registry`'s.
"""
