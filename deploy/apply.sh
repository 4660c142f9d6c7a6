#!/usr/bin/env bash
# Brings the cluster of the current kubectl context to what an overlay says.
#
#   deploy/apply.sh local
#   deploy/apply.sh staging      refuses images that are not pinned by digest
#
# In order: what everything needs, then the stores, then the migration, then what serves. A rollout
# that does not get ready leaves the pods of before in service, and this script fails.
set -euo pipefail
cd "$(dirname "$0")/.."

overlay=${1:?which overlay: local, free, staging or prod}
rendered=build/render/$overlay.yaml
secrets=${SECRETS:-secrets}/$overlay.enc.yaml
python=${PYTHON:-.venv/bin/python}
patience=${PATIENCE:-600s}
export PYTHONPATH=.:client

flags=()
[ "$overlay" = local ] || flags+=(--released)
"$python" -m deploy render "${flags[@]}" "$overlay"

# Where External Secrets does not copy them from Vault, they are in a file.
if ! grep -q '^kind: ExternalSecret' "$rendered" && [ ! -f "$secrets" ]; then
  echo "there is no $secrets: python -m deploy secrets new $overlay (secrets/README.md)" >&2
  exit 1
fi

apply() { kubectl apply --server-side --field-manager=kimberly -f - "$@"; }

kubectl apply --server-side --field-manager=kimberly -f kustomize/base/platform/namespace.yaml
if [ -f "$secrets" ]; then
  build/deploy/bin/sops decrypt "$secrets" | apply
fi
apply -l '!kimberly/stage' < "$rendered"
kubectl -n kimberly wait --for=condition=Ready certificates --all --timeout="$patience"
# Not what observes: a release does not wait for that.
for store in $(kubectl -n kimberly get statefulsets -o name -l app.kubernetes.io/component=store); do
  kubectl -n kimberly rollout status "$store" --timeout="$patience"
done
if grep -q '^apiVersion: postgresql.cnpg.io/' "$rendered"; then
  kubectl -n kimberly wait --for=condition=Ready clusters.postgresql.cnpg.io --all --timeout="$patience"
fi

# A job cannot be changed.
kubectl -n kimberly delete job migration --ignore-not-found --wait
apply -l kimberly/stage=migrate < "$rendered"
kubectl -n kimberly wait --for=condition=Complete job/migration --timeout="$patience"

apply -l kimberly/stage=serve < "$rendered"
# Secrets are variables of their processes: whoever has old ones starts anew.
if [ -f "$secrets" ]; then
  digest=$(sha256sum < "$secrets" | cut -c1-16)
  for deployment in auth jobs memory; do
    kubectl -n kimberly patch deployment "$deployment" --field-manager=kimberly-secrets --patch \
      '{"spec": {"template": {"metadata": {"annotations": {"kimberly/secrets": "'"$digest"'"}}}}}'
  done
fi
for deployment in auth jobs memory worker edge; do
  kubectl -n kimberly rollout status "deployment/$deployment" --timeout="$patience"
done
