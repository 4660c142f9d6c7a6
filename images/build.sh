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

# shellcheck source=images/bases.env
source images/bases.env
docker buildx create --name kimberly --driver docker-container --use >&2
service=$(build kimberly service \
  --build-arg "BUILDER_IMAGE=${BUILDER_IMAGE}@$(digest_of "$BUILDER_IMAGE")" \
  --build-arg "BASE_IMAGE=${BASE_IMAGE}@$(digest_of "$BASE_IMAGE")")
backup=$(build backup backup \
  --build-arg "SERVICE_IMAGE=$(images/name.sh)@$service" \
  --build-arg "POSTGRES_IMAGE=${POSTGRES_IMAGE}@$(digest_of "$POSTGRES_IMAGE")")
echo "digest=$service $backup"
