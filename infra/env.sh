#!/bin/sh
# Writes an environment file (infra/.env, or the one named) from .env.example, with random secrets and with the stack's
# name and ports as the environment has them; leaves one that is there as it is.
set -eu
here=$(dirname "$0")
file=${1:-$here/.env}
[ -e "$file" ] && { echo "$file is there already"; exit 0; }
case ${ENGINERY_STACK:-enginery} in
  [!a-z0-9]*|*[!a-z0-9_-]*)
    echo "error: a stack cannot be named $ENGINERY_STACK; small letters, digits, - and _ make a name" >&2; exit 1 ;;
esac
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
socket=${DOCKER_SOCKET:-/var/run/docker.sock}
group=$(stat -c %g "$socket" 2>/dev/null || stat -f %g "$socket") || {
  echo "error: $socket is not there; start Docker, or name its socket with DOCKER_SOCKET" >&2; exit 1; }
# How many containers of 8 GB and two threads run beside what is always there: 8 GB for one of the pool `gpu`, 4 GB for
# the services. The engine knows its machine's memory; where none answers, this machine's counts.
steps() {
  memory=$(docker info --format '{{.MemTotal}}' 2>/dev/null || true)
  case $memory in ''|0|*[!0-9]*)
    memory=$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1000/p' /proc/meminfo 2>/dev/null || true) ;;
  esac
  fit=$(((${memory:-0} - 12000000000) / 8000000000))
  cores=$(($(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) / 2))
  [ "$fit" -le "$cores" ] || fit=$cores
  [ "$fit" -ge 1 ] || fit=1
  echo "$fit"
}
umask 077
while IFS= read -r line; do
  case $line in
    ENGINERY_STACK=*) echo "ENGINERY_STACK=${ENGINERY_STACK:-${line#*=}}" ;;
    ENGINERY_PREFECT_PORT=*) echo "ENGINERY_PREFECT_PORT=${ENGINERY_PREFECT_PORT:-${line#*=}}" ;;
    ENGINERY_MLFLOW_PORT=*) echo "ENGINERY_MLFLOW_PORT=${ENGINERY_MLFLOW_PORT:-${line#*=}}" ;;
    ENGINERY_S3_PORT=*) echo "ENGINERY_S3_PORT=${ENGINERY_S3_PORT:-${line#*=}}" ;;
    PREFECT_AUTH=) echo "PREFECT_AUTH=enginery:$(secret)" ;;
    DOCKER_GID=) echo "DOCKER_GID=$group" ;;
    ENGINERY_CPU_STEPS=) echo "ENGINERY_CPU_STEPS=${ENGINERY_CPU_STEPS:-$(steps)}" ;;
    SHARDS=|POOLS=|SCHEDULED_RECIPE=) echo "$line" ;;
    *[A-Z]=) echo "$line$(secret)" ;;
    *) echo "$line" ;;
  esac
done < "$here/.env.example" > "$file.new"
mv "$file.new" "$file"
echo "wrote $file with random secrets"
