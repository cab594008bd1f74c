"""The only importers of vendors: TensorRT, ONNX Runtime, boto3, the hub; and the sources and stores behind them.

May be imported from here: anything. Never comes in: torch models, and decisions.
"""
