#!/usr/bin/env bash
# Looks for known weaknesses in the images of production that have a remedy. Needs Docker, and every
# image pinned by digest (python -m deploy pin): a tag is by now another image than the one that runs.
set -euo pipefail
cd "$(dirname "$0")/.."
scanner=${SCANNER:-docker.io/aquasec/trivy:0.67.2}
component=kustomize/components/images/kustomization.yaml
found=0
if tags=$(grep newTag: "$component"); then
  echo "not pinned by digest:" "$tags" >&2
  exit 2
fi
while read -r image; do
  docker run --rm --volume "$HOME/.docker:/root/.docker:ro" "$scanner" image --quiet --exit-code 1 \
    --severity HIGH,CRITICAL --ignore-unfixed "$image" < /dev/null || found=1
done < <(awk '/newName:/ {at = $2} /digest:/ {print at "@" $2}' "$component")
exit "$found"
