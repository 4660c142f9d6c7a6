#!/usr/bin/env bash
# Builds the Dockerfile without Docker and without a registry of images, as root: on a Debian base made
# by debootstrap, with buildah. Packages come from wherever apt and pip of this machine get theirs.
# The image is not the one that is released, whose bases are others; its steps are.
#
#   images/build-offline.sh DIRECTORY     keeps base and storage there; about 3 minutes and 2 GB
set -euo pipefail
cd "$(dirname "$0")/.."
directory=$(realpath "${1:?a directory to work in}")
mkdir -p "$directory"
policy=$directory/policy.json
echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$policy"

build() { buildah --root "$directory/storage" --runroot "$directory/run" --storage-driver vfs "$@"; }

if [ ! -d "$directory/base" ]; then
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates trixie "$directory/draft"
  mv "$directory/draft" "$directory/base"
fi
base=$(build from scratch)
build add --quiet "$base" "$directory/base" /
build config --env PATH=/usr/local/bin:/usr/bin:/bin "$base"
build commit --quiet --signature-policy "$policy" "$base" localhost/base:trixie
build rm "$base" > /dev/null

build bud --isolation chroot --network host --pull-never --signature-policy "$policy" \
  --volume /etc/ssl/certs:/etc/ssl/certs:ro \
  --build-arg BUILDER_IMAGE=localhost/base:trixie --build-arg BASE_IMAGE=localhost/base:trixie \
  --build-arg UV_SYSTEM_CERTS=true \
  --file images/service/Dockerfile --tag localhost/kimberly:offline .

container=$(build from --signature-policy "$policy" --pull-never localhost/kimberly:offline)
run() { build run --isolation chroot "$container" -- "$@"; }
[ "$(run id --user)" = 65532 ] || { echo "it is not run as user 65532"; exit 1; }
run python3 -m server --help > /dev/null
# 78: they look for their settings, so all that they import is there.
for command in "server auth" "server memory" "server jobs" "server migrate" "server provision" "server backup create" "server backup verify" "server backup restore" workers deploy.pods deploy.drain "deploy.machine serve auth"; do
  # shellcheck disable=SC2086
  said=$(run python3 -m $command 2>&1) && { echo "$command: ran without settings"; exit 1; }
  grep -q "The environment is not complete" <<< "$said" || { echo "$command: $said"; exit 1; }
done
build rm "$container" > /dev/null
echo "image     ok"
