#!/bin/sh
# Waits until the set-up has ended well and every service is healthy; says what is not, after ten minutes.
set -eu
label=com.docker.compose.project=enginery
for _ in $(seq 200); do
  set_up=$(docker ps -aq --filter "label=$label" --filter label=com.docker.compose.service=set-up | head -1)
  state=$([ -n "$set_up" ] && docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$set_up" || echo missing)
  waiting=$(docker ps --filter "label=$label" --filter health=starting --format '{{.Names}}')
  workers=$(docker ps -q --filter "label=$label" --filter label=com.docker.compose.service=flows-worker)
  if [ "$state" = "exited 0" ] && [ -z "$waiting" ] && [ -n "$workers" ]; then
    echo "Prefect: http://127.0.0.1:4200   MLflow: http://127.0.0.1:5000   S3: http://127.0.0.1:8333"
    exit 0
  fi
  case $state in "exited 0"|"created 0"|running*|missing) ;; *) docker logs --tail 20 "$set_up" >&2; break ;; esac
  sleep 3
done
echo "error: production is not up: set-up is $state; starting: ${waiting:-none}" >&2
docker ps -a --filter "label=$label" --format '{{.Names}}: {{.Status}}' >&2
exit 1
