#!/bin/sh
# Waits until the set-up of the stack $ENGINERY_STACK has ended well and every service is healthy; says what is not,
# after ten minutes.
set -eu
label=com.docker.compose.project=${ENGINERY_STACK:-enginery}
of() { docker ps -aq --filter "label=$label" --filter "label=com.docker.compose.service=$1" | head -1; }
at() { docker port "$(of "$1")" "$2/tcp" | head -1; }
for _ in $(seq 200); do
  set_up=$(of set-up)
  state=$([ -n "$set_up" ] && docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$set_up" || echo missing)
  waiting=$(docker ps --filter "label=$label" --filter health=starting --format '{{.Names}}')
  workers=$(docker ps -q --filter "label=$label" --filter label=com.docker.compose.service=flows-worker)
  if [ "$state" = "exited 0" ] && [ -z "$waiting" ] && [ -n "$workers" ]; then
    echo "Prefect: http://$(at prefect 4200)   MLflow: http://$(at mlflow 5000)   S3: http://$(at s3 8333)"
    exit 0
  fi
  case $state in "exited 0"|"created 0"|running*|missing) ;; *) docker logs --tail 20 "$set_up" >&2; break ;; esac
  sleep 3
done
echo "error: production is not up: set-up is $state; starting: ${waiting:-none}" >&2
docker ps -a --filter "label=$label" --format '{{.Names}}: {{.Status}}' >&2
exit 1
