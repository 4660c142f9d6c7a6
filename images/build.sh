#!/usr/bin/env bash
# Builds our images for the architecture of this machine, pushes them by digest, and prints these as
# digest=sha256:… sha256:… : of the services, then of backups, which is the former and a little more.
# Their names are those of kustomize/components/images.
set -euo pipefail
cd "$(dirname "$0")/.."
metadata=$(mktemp)

digest_of() { docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'; }

build() {  # short name in the manifests, directory of the Dockerfile, further options
  local image
  image=$(images/name.sh "$1")
  docker buildx build . \
    --file "images/$2/Dockerfile" \
    --build-arg "REVISION=$(git rev-parse HEAD)" \
    --sbom=true --provenance=mode=max \
    --metadata-file "$metadata" \
    --output "type=image,name=$image,push-by-digest=true,name-canonical=true,push=true" "${@:3}" >&2
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["containerimage.digest"])' "$metadata"
}

base() {  # directory of the Dockerfile, argument: its default there, by digest
  local image
  image=$(sed -n "s/^ARG $2=//p" "images/$1/Dockerfile")
  echo "$2=$image@$(digest_of "$image")"
}

docker buildx create --name kimberly --driver docker-container --use >&2
service=$(build kimberly service \
  --build-arg "$(base service BUILDER_IMAGE)" \
  --build-arg "$(base service BASE_IMAGE)")
backup=$(build backup backup \
  --build-arg "SERVICE_IMAGE=$(images/name.sh)@$service" \
  --build-arg "$(base backup POSTGRES_IMAGE)")
echo "digest=$service $backup"
