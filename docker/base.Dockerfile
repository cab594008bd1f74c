# Stages that move and cut bytes: fetch, corpus. The other images begin here.
FROM python:3.11-slim-bookworm
ARG COMMIT=""
LABEL org.opencontainers.image.title="enginery" org.opencontainers.image.revision="${COMMIT}"
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 ENGINERY_COMMIT="${COMMIT}" ENGINERY_IMAGE="base" ENGINERY_HOME=/scratch
RUN useradd --create-home --uid 10001 enginery && install -d -o enginery -g enginery /scratch /opt/enginery
WORKDIR /opt/enginery
COPY constraints.txt ./
RUN python3 -m pip install --constraint constraints.txt \
    pydantic boto3 pyarrow safetensors numpy huggingface_hub tenacity gguf
COPY stages stages
USER enginery
VOLUME /scratch
ENTRYPOINT ["python3", "-m", "stages"]
