#!/usr/bin/env bash
# Makes one list of each of our images for both architectures, looks up the digests of all that is
# not ours, and prints what `python -m deploy pin` takes, as pins=… . Takes what images/build.sh
# printed on each of the two machines:
#   images/pins.sh 'sha256:SERVICE sha256:BACKUP' 'sha256:SERVICE sha256:BACKUP'
set -euo pipefail
cd "$(dirname "$0")/.."
read -r -a amd64 <<< "${1:?the digests for amd64}"
read -r -a arm64 <<< "${2:?the digests for arm64}"
ours=(kimberly backup)

digest_of() { docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'; }

pins=''
for number in "${!ours[@]}"; do
  image=$(images/name.sh "${ours[number]}")
  release=$image:$(git rev-parse --short=12 HEAD)
  docker buildx imagetools create --tag "$release" \
    "$image@${amd64[number]}" "$image@${arm64[number]}" >&2
  pins+=" ${ours[number]}=$(digest_of "$release")"
done
component=kustomize/components/images/kustomization.yaml
while read -r name at; do
  [[ " ${ours[*]} " == *" $name "* ]] || pins+=" $name=$(digest_of "$at")"
done < <(awk '/- name:/ {name = $3} /newName:/ {at = $2}
              /newTag:/ {gsub(/"/, "", $2); print name, at ":" $2}' "$component")
echo "pins=${pins# }"
