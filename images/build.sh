#!/usr/bin/env bash
# Builds the image for the architecture of this machine, pushes it by digest, and prints that digest
# as digest=sha256:… . Its name is the one of kustomize/components/images.
set -euo pipefail
cd "$(dirname "$0")/.."
image=$(images/name.sh)
metadata=$(mktemp)

digest_of() { docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'; }

# shellcheck source=images/bases.env
source images/bases.env
docker buildx create --name kimberly --driver docker-container --use >&2
docker buildx build . \
  --file images/service/Dockerfile \
  --build-arg "BUILDER_IMAGE=${BUILDER_IMAGE}@$(digest_of "$BUILDER_IMAGE")" \
  --build-arg "BASE_IMAGE=${BASE_IMAGE}@$(digest_of "$BASE_IMAGE")" \
  --build-arg "REVISION=$(git rev-parse HEAD)" \
  --sbom=true --provenance=mode=max \
  --metadata-file "$metadata" \
  --output "type=image,name=$image,push-by-digest=true,name-canonical=true,push=true" >&2
python3 -c 'import json, sys; print("digest=" + json.load(open(sys.argv[1]))["containerimage.digest"])' "$metadata"
