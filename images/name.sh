#!/usr/bin/env bash
# Prints the name of one of our images, kimberly unless told otherwise, as the manifests have it: the
# registry of whoever runs the mesh.
set -euo pipefail
cd "$(dirname "$0")/.."
awk -v short="${1:-kimberly}" '$2 == "name:" && $3 == short {ours = 1} ours && /newName:/ {print $2; exit}' \
  kustomize/components/images/kustomization.yaml
