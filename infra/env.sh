#!/bin/sh
# Writes infra/.env from infra/.env.example with random secrets; leaves one that is there as it is.
set -eu
cd "$(dirname "$0")"
[ -e .env ] && { echo "infra/.env is there already"; exit 0; }
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
socket=${DOCKER_SOCKET:-/var/run/docker.sock}
group=$(stat -c %g "$socket" 2>/dev/null || stat -f %g "$socket") || {
  echo "error: $socket is not there; start Docker, or name its socket with DOCKER_SOCKET" >&2; exit 1; }
umask 077
while IFS= read -r line; do
  case $line in
    PREFECT_AUTH=) echo "PREFECT_AUTH=enginery:$(secret)" ;;
    DOCKER_GID=) echo "DOCKER_GID=$group" ;;
    SHARDS=|POOLS=) echo "$line" ;;
    *[A-Z]=) echo "$line$(secret)" ;;
    *) echo "$line" ;;
  esac
done < .env.example > .env.new
mv .env.new .env
echo "wrote infra/.env with random secrets"
