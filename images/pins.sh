#!/usr/bin/env bash
# Makes one list of the images of both architectures, looks up the digests of all that is not ours,
# and prints what `python -m deploy pin` takes, as pins=… :
#   images/pins.sh sha256:AMD64 sha256:ARM64
set -euo pipefail
cd "$(dirname "$0")/.."
image=$(images/name.sh) amd64=${1:?the digest for amd64} arm64=${2:?the digest for arm64}

digest_of() { docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'; }

release=$image:$(git rev-parse --short=12 HEAD)
docker buildx imagetools create --tag "$release" "$image@$amd64" "$image@$arm64" >&2
pins="kimberly=$(digest_of "$release")"
component=kustomize/components/images/kustomization.yaml
while read -r name at; do
  [ "$name" = kimberly ] || pins+=" $name=$(digest_of "$at")"
done < <(awk '/- name:/ {name = $3} /newName:/ {at = $2}
              /newTag:/ {gsub(/"/, "", $2); print name, at ":" $2}' "$component")
echo "pins=$pins"
