"""The only importers of vendors: TensorRT, ONNX Runtime, boto3, the hub."""
