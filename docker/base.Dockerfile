# Stages that move bytes. Libraries first and the project last, so that a changed line of code rebuilds one small layer.
FROM python:3.11-slim-bookworm AS wanted
WORKDIR /wanted
COPY pyproject.toml docker/requirements.py ./
RUN for extra in base torch tensorrt server; do python3 requirements.py $extra > $extra.txt; done

FROM python:3.11-slim-bookworm AS libraries
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 enginery && install -d -o enginery -g enginery /scratch
WORKDIR /opt/enginery
COPY constraints.txt ./
COPY --from=wanted /wanted/*.txt wanted/
RUN python3 -m pip install --constraint constraints.txt --requirement wanted/base.txt

FROM libraries AS image
ARG COMMIT="" VERSION="" IMAGE=base
LABEL org.opencontainers.image.title="enginery/${IMAGE}" org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${COMMIT}" org.opencontainers.image.licenses="Apache-2.0"
ENV ENGINERY_IMAGE="${IMAGE}" ENGINERY_COMMIT="${COMMIT}" ENGINERY_HOME=/scratch HOME=/scratch PYTHONPATH=/opt/enginery
COPY stages stages
COPY flows flows
USER enginery
VOLUME /scratch
ENTRYPOINT []
CMD ["python3", "-m", "stages", "--help"]
