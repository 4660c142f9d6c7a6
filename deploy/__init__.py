"""How the mesh runs in Kubernetes: what its pods do there, and what its manifests must keep to."""
