# compile: an engine for the GPU, ahead of time.
FROM enginery/base:latest
# tensorrt_rtx builds for other GPUs without one; tensorrt is for Hopper and needs its GPU.
ARG TRT=tensorrt_rtx
ENV ENGINERY_IMAGE="tensorrt"
USER root
RUN python3 -m pip install --constraint constraints.txt onnx onnxruntime tokenizers \
    $([ "$TRT" = tensorrt_rtx ] && echo tensorrt-rtx || echo tensorrt)
USER enginery
