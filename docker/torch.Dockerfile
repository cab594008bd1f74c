# Stages that compute on weights: share, prune, recover, quantize, export, validate.
FROM enginery/base:latest
# Where torch comes from: empty takes pip's own index; name the CPU or a CUDA index of PyTorch to choose.
ARG TORCH_INDEX=""
ENV ENGINERY_IMAGE="torch"
USER root
RUN python3 -m pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && python3 -m pip install --constraint constraints.txt \
    transformers tokenizers accelerate onnx onnxruntime onnxscript scikit-learn scipy
USER enginery
