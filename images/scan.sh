#!/usr/bin/env bash
# Looks for known weaknesses in the images of production that have a remedy. Needs Docker.
set -euo pipefail
cd "$(dirname "$0")/.."
scanner=${SCANNER:-docker.io/aquasec/trivy:0.67.2}
component=kustomize/components/images/kustomization.yaml
found=0
while read -r image; do
  docker run --rm --volume "$HOME/.docker:/root/.docker:ro" "$scanner" image --quiet --exit-code 1 \
    --severity HIGH,CRITICAL --ignore-unfixed "$image" || found=1
done < <(awk '/newName:/ {at = $2}
              /newTag:/ {gsub(/"/, "", $2); print at ":" $2}
              /digest:/ {print at "@" $2}' "$component")
exit "$found"
