# Production runs on a managed Kubernetes with managed PostgreSQL, Valkey and S3, of whichever provider:
# those are bought, with their network, and not described here. What is described is the name, and by
# the output `expected` what our manifests expect of all else.

terraform {
  required_version = ">= 1.6"
  required_providers {
    cloudflare = { source = "cloudflare/cloudflare", version = "~> 5.0" }
  }
  # terraform init -backend-config=backend.hcl, with bucket, region, key and use_lockfile = true.
  backend "s3" {}
}

variable "host_name" {
  description = "Name of the edge."
  type        = string
}

variable "zone_id" {
  description = "Zone of that name at Cloudflare."
  type        = string
}

variable "edge_addresses" {
  description = "IPv4 addresses of the load balancer of the service edge, one a zone."
  type        = list(string)

  validation {
    condition     = length(var.edge_addresses) >= 2
    error_message = "One address is one zone."
  }
}

# CLOUDFLARE_API_TOKEN
provider "cloudflare" {}

module "sizing" {
  source = "../../modules/sizing"
  free   = false
  nodes  = { count = 3, ocpus = 4, memory_gb = 16, boot_volume_gb = 100 }
}

module "name" {
  source    = "../../modules/dns"
  zone_id   = var.zone_id
  host_name = var.host_name
  addresses = var.edge_addresses
}

output "expected" {
  description = "What the manifests expect to be bought. Stores have addresses of subnets.data alone."
  value = {
    nodes   = merge(module.sizing.nodes, { zones = 3 })
    subnets = module.sizing.subnets
    stores = {
      postgresql = "18 with pgvector, one standby in another zone, one read replica for backups"
      valkey     = "9, one standby in another zone"
      buckets    = { mesh = "kimberly, versioned", backups = "kimberly-backups-prod, versioned, in another region" }
    }
  }
}
