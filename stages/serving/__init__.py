"""One face over every backend that answers.

May be imported from here: the face. Never comes in: MLflow, which wraps it from `flows.registry.served`.
"""
