# Stages that compute on weights: fetch, share, prune, recover, quantize, export, validate, bench.
FROM enginery/base:libraries AS libraries
# Where torch comes from: empty takes pip's own index; name the CPU or a CUDA index of PyTorch to choose.
ARG TORCH_INDEX=""
# seqeval and rouge-score come as sources; an older pip would run their setup.py with whatever lies in the image.
RUN python3 -m pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && python3 -m pip install --use-pep517 --constraint constraints.txt --requirement wanted/torch.txt

FROM libraries AS image
ARG COMMIT="" VERSION="" IMAGE=torch
LABEL org.opencontainers.image.title="enginery/${IMAGE}" org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${COMMIT}" org.opencontainers.image.licenses="Apache-2.0"
ENV ENGINERY_IMAGE="${IMAGE}" ENGINERY_COMMIT="${COMMIT}" ENGINERY_HOME=/scratch HOME=/scratch PYTHONPATH=/opt/enginery
COPY stages stages
COPY flows flows
USER enginery
VOLUME /scratch
ENTRYPOINT []
CMD ["python3", "-m", "stages", "--help"]
