#!/usr/bin/env bash
# Brings an organization of Fly.io to what fly/*.toml and the pinned images say: run again for every
# release, and before the certificates end that it issues (90 days).
#
#   deploy/fly.sh api.kimberly.example             by which name clients call
#   deploy/fly.sh --dry-run api.kimberly.example   prints what it would do, and asks nobody
#
# In order: apps and their secrets, the stores, the migration, what serves, the daily backup. What is
# there already stays; a deployment that does not get ready leaves the machines of before, and this
# script fails. See docs/operations.md for the steps before and after, and for what it costs.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=''
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
host_name=${1:?by which name clients call, such as api.kimberly.example}
prefix=${PREFIX:-kimberly}
organization=${ORGANIZATION:-personal}
region=${REGION:-fra}
python=${PYTHON:-.venv/bin/python}
s3_endpoint=${S3_ENDPOINT:-fly.storage.tigris.dev}
s3_region=${S3_REGION:-auto}
s3_bucket=${S3_BUCKET:-$prefix}
backup_s3_endpoint=${BACKUP_S3_ENDPOINT:-$s3_endpoint}
backup_s3_region=${BACKUP_S3_REGION:-$s3_region}
backup_s3_bucket=${BACKUP_S3_BUCKET:-$prefix-backups}
smtp_host=${SMTP_HOST:-smtp.$host_name}
smtp_user=${SMTP_USER:-$prefix}
mail_sender=${MAIL_SENDER:-Kimberly <no-reply@$host_name>}
export PYTHONPATH=.:client

stores=(postgres valkey)
services=(auth memory jobs worker edge)

tell() { printf '%q ' "$@"; echo; }

run() {
  if [ -n "$dry" ]; then tell "$@"; else "$@"; fi
}

stop() {
  echo "$1" >&2
  exit 78
}

image() {  # a short name
  if [ -n "$dry" ]; then echo "$1@digest"; else sed -n "s/^$1 //p" <<< "$images"; fi
}

# Dry, nothing is there yet.
has() {  # an app, then what flyctl is asked of it, to answer in JSON
  [ -z "$dry" ] && flyctl "${@:2}" --app "$prefix-$1" --json 2> /dev/null
}

app() {
  if ! has "$1" status > /dev/null; then
    run flyctl apps create "$prefix-$1" --org "$organization" --yes
  fi
  if [ -n "$dry" ]; then
    tell flyctl secrets import --stage --app "$prefix-$1"
  else
    # By a pipe: an argument could be read by other processes.
    printf '%s\n' "$secrets" | sed -n "s/^$1 //p" | flyctl secrets import --stage --app "$prefix-$1"
  fi
}

deploy() {  # an app, then what else flyctl is told
  run flyctl deploy . --config "fly/$1.toml" --app "$prefix-$1" --primary-region "$region" \
    --ha=false --yes "${@:2}"
}

deploy_built() {  # an app on the image of the services and Envoy
  deploy "$1" --dockerfile images/fly/Dockerfile \
    --build-arg "SERVICE_IMAGE=$service_image" --build-arg "ENVOY_IMAGE=$envoy_image" "${@:2}"
}

if [ -z "$dry" ]; then
  command -v flyctl > /dev/null || stop 'flyctl is not installed: see https://fly.io/docs/flyctl/install/'
  flyctl auth whoami > /dev/null || stop 'nobody is logged in: flyctl auth login'
  [ -f secrets/fly.enc.yaml ] || stop 'there is no secrets/fly.enc.yaml: see secrets/README.md'
  images=$("$python" -m deploy fly images)
  secrets=$("$python" -m deploy fly secrets --prefix "$prefix" --host-name "$host_name")
fi
service_image=$(image kimberly)
envoy_image=$(image envoy)

for name in "${stores[@]}" migration "${services[@]}" backup; do
  app "$name"
done

deploy postgres --image "$(image postgres)" --no-public-ips
deploy valkey --image "$(image valkey)" --no-public-ips

# Its machine ends as soon as it has begun.
deploy_built migration --no-public-ips --smoke-checks=false

mesh=(--env "KIMBERLY_PEER_NAMES=$prefix-{process}.internal" --env "KIMBERLY_TOKEN_ISSUER=https://$host_name")
s3=(--env "KIMBERLY_S3_ENDPOINT=$s3_endpoint" --env "KIMBERLY_S3_REGION=$s3_region" --env "KIMBERLY_S3_BUCKET=$s3_bucket")
backup_s3=(--env "KIMBERLY_BACKUP_S3_ENDPOINT=$backup_s3_endpoint" --env "KIMBERLY_BACKUP_S3_REGION=$backup_s3_region"
  --env "KIMBERLY_BACKUP_S3_BUCKET=$backup_s3_bucket")
# Whoever signs up gets a mail first.
mails=(--env "KIMBERLY_SMTP_HOST=$smtp_host" --env "KIMBERLY_SMTP_USER=$smtp_user" --env "KIMBERLY_MAIL_SENDER=$mail_sender")
deploy_built auth --no-public-ips "${mesh[@]}" "${s3[@]}" "${backup_s3[@]}" "${mails[@]}"
deploy_built memory --no-public-ips "${mesh[@]}" "${s3[@]}"
deploy_built jobs --no-public-ips "${mesh[@]}" "${s3[@]}"
deploy_built worker --no-public-ips "${mesh[@]}"

# Raw TCP: a shared IPv4 address goes by what Fly's proxy reads of TLS or HTTP, and it reads neither.
if ! has edge ips list | grep '"v4"' > /dev/null; then
  run flyctl ips allocate-v4 --app "$prefix-edge" --yes
fi
if ! has edge ips list | grep '"v6"' > /dev/null; then
  run flyctl ips allocate-v6 --app "$prefix-edge"
fi
deploy_built edge --no-public-ips "${mesh[@]}" --env "KIMBERLY_HOST_NAMES=$host_name"

deploy backup --image "$(image backup)" --no-public-ips --smoke-checks=false "${s3[@]}" "${backup_s3[@]}"
machine=MACHINE
[ -n "$dry" ] || machine=$(flyctl machine list --app "$prefix-backup" --json \
  | "$python" -c 'import json, sys; print(json.load(sys.stdin)[0]["id"])')
run flyctl machine update "$machine" --app "$prefix-backup" --schedule daily --skip-start --yes

echo
echo "Point $host_name to the addresses of: flyctl ips list --app $prefix-edge"
echo "Then: PYTHONPATH=.:client $python -m deploy smoke https://$host_name"
