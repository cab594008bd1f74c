#!/bin/sh
# Builds every image in the order in which they stand on each other, and prints their sizes.
# TORCH_INDEX and TRT choose the torch build and the TensorRT family; DOCKER_FLAGS goes to `docker build`.
set -eu
cd "$(dirname "$0")/.."
docker info >/dev/null 2>&1 || { echo "error: no Docker engine answers; start one and run again" >&2; exit 1; }
commit=$(git rev-parse HEAD 2>/dev/null || echo "")
for image in base torch tensorrt server; do
  # shellcheck disable=SC2086
  docker build ${DOCKER_FLAGS:-} --file "docker/$image.Dockerfile" --tag "enginery/$image:latest" \
    --build-arg COMMIT="$commit" --build-arg TORCH_INDEX="${TORCH_INDEX:-}" --build-arg TRT="${TRT:-tensorrt_rtx}" .
done
docker image ls --filter 'reference=enginery/*' --format '{{.Repository}}\t{{.Size}}'
