#!/usr/bin/env bash
# Prints the name of our image, as the manifests have it: the registry of whoever runs the mesh.
set -euo pipefail
cd "$(dirname "$0")/.."
awk '/- name: kimberly$/ {ours = 1} ours && /newName:/ {print $2; exit}' \
  kustomize/components/images/kustomization.yaml
