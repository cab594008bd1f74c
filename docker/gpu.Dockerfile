# validate and bench of plans, where a GPU is that they are for: torch for the baseline beside TensorRT.
FROM enginery/torch:libraries AS libraries
ARG TRT=tensorrt_rtx
RUN if [ "$TRT" = tensorrt ]; then sed -i s/^tensorrt-rtx$/tensorrt/ wanted/tensorrt.txt; fi \
 && python3 -m pip install --constraint constraints.txt --requirement wanted/tensorrt.txt

FROM libraries AS image
ARG COMMIT="" VERSION="" IMAGE=gpu
LABEL org.opencontainers.image.title="enginery/${IMAGE}" org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${COMMIT}" org.opencontainers.image.licenses="Apache-2.0"
ENV ENGINERY_IMAGE="${IMAGE}" ENGINERY_COMMIT="${COMMIT}" ENGINERY_HOME=/scratch HOME=/scratch PYTHONPATH=/opt/enginery
COPY stages stages
COPY flows flows
USER enginery
VOLUME /scratch
ENTRYPOINT []
CMD ["python3", "-m", "stages", "--help"]
