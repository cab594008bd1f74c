# The pipeline itself: the `enginery` command, Prefect, MLflow.
FROM enginery/torch:latest
ENV ENGINERY_IMAGE="server"
USER root
COPY pyproject.toml README.md LICENSE ./
COPY flows flows
RUN python3 -m pip install --constraint constraints.txt .
USER enginery
ENTRYPOINT ["enginery"]
CMD ["--help"]
