"""MLflow: the connection and its errors, runs and their steps, what earlier ones left running, metrics in batches.

May be imported from here: anything. Never comes in: the registry of models, which is `flows.registry`'s.
"""
