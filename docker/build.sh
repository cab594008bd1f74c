#!/bin/sh
# Builds every image in the order in which they stand on each other, and prints their sizes.
# TORCH_INDEX and TRT choose the torch build and the TensorRT family; DOCKER_FLAGS goes to `docker build`. With GPUS above 0
# there is an image besides, in which plans are executed.
set -eu
cd "$(dirname "$0")/.."
docker info >/dev/null 2>&1 || { echo "error: no Docker engine answers; start one and run again" >&2; exit 1; }
commit=$(git rev-parse HEAD 2>/dev/null || echo "")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

build() { # build IMAGE TARGET TAG
  # shellcheck disable=SC2086
  DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} docker build --quiet ${DOCKER_FLAGS:-} --file "docker/$1.Dockerfile" \
    --target "$2" --tag "enginery/$1:$3" --build-arg COMMIT="$commit" --build-arg VERSION="$version" \
    --build-arg TORCH_INDEX="${TORCH_INDEX:-}" --build-arg TRT="${TRT:-tensorrt_rtx}" . >/dev/null
}

for image in base torch tensorrt server $([ "${GPUS:-0}" = 0 ] || echo gpu); do
  echo "building enginery/$image:$version"
  build "$image" libraries libraries
  build "$image" image "$version"
done
docker image ls --filter "reference=enginery/*:$version" --format 'table {{.Repository}}:{{.Tag}}\t{{.Size}}'
