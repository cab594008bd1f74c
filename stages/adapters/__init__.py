"""The only importers of vendors: TensorRT, ONNX Runtime, boto3, the hub; and the sources and stores behind them.

`<scheme>_store` and `<name>_backend` are found by their names: `connect` opens a store, `backends` a backend.

May be imported from here: anything. Never comes in: torch models, and decisions.
"""
