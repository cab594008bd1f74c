# The pipeline itself: the `enginery` command, Prefect and its workers, MLflow.
FROM enginery/torch:libraries AS libraries
RUN python3 -m pip install --constraint constraints.txt --requirement wanted/server.txt

FROM libraries AS image
ARG COMMIT="" VERSION="" IMAGE=server
LABEL org.opencontainers.image.title="enginery/${IMAGE}" org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${COMMIT}" org.opencontainers.image.licenses="Apache-2.0"
ENV ENGINERY_IMAGE="${IMAGE}" ENGINERY_COMMIT="${COMMIT}" ENGINERY_HOME=/scratch HOME=/scratch PYTHONPATH=/opt/enginery
COPY stages stages
COPY flows flows
COPY infra infra
RUN printf '#!/bin/sh\nexec python3 -m flows "$@"\n' > /usr/local/bin/enginery && chmod 755 /usr/local/bin/enginery
USER enginery
VOLUME /scratch
ENTRYPOINT []
CMD ["enginery", "--help"]
