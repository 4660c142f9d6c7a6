# A paid node of the same kind, large enough for CloudNativePG's three instances. Its stores are in the
# cluster; the bucket of its backups is not.

terraform {
  # This backend came with 1.12.
  required_version = ">= 1.12"
  required_providers {
    oci        = { source = "oracle/oci", version = "~> 7.0" }
    cloudflare = { source = "cloudflare/cloudflare", version = "~> 5.0" }
  }
  # terraform init -backend-config=backend.hcl, with bucket, namespace, region and key.
  backend "oci" {}
}

variable "tenancy" {
  description = "What Oracle calls whom, and where."
  type = object({
    compartment_id      = string
    region              = string
    availability_domain = string
    image_id            = string
  })
}

variable "administrators" {
  description = "Networks from which the node may be administered."
  type        = set(string)
}

variable "ssh_public_key" {
  description = "Who may log in to the node."
  type        = string
}

variable "host_name" {
  description = "Name of the edge."
  type        = string
}

variable "zone_id" {
  description = "Zone of that name at Cloudflare."
  type        = string
}

variable "k3s" {
  description = "Which k3s, and the SHA-256 of its installation script."
  type        = object({ version = string, installer_sha256 = string })
}

provider "oci" {
  region = var.tenancy.region
}

# CLOUDFLARE_API_TOKEN
provider "cloudflare" {}

module "sizing" {
  source = "../../modules/sizing"
  free   = false
  nodes  = { count = 1, ocpus = 4, memory_gb = 24, boot_volume_gb = 200 }
}

module "network" {
  source         = "../../modules/network"
  compartment_id = var.tenancy.compartment_id
  cidr           = module.sizing.network_cidr
  nodes_cidr     = module.sizing.subnets.nodes
  administrators = var.administrators
}

module "server" {
  source               = "../../modules/k3s-oci"
  compartment_id       = var.tenancy.compartment_id
  availability_domain  = var.tenancy.availability_domain
  subnet_id            = module.network.subnet_id
  security_group_id    = module.network.security_group_id
  image_id             = var.tenancy.image_id
  node                 = module.sizing.nodes
  ssh_public_key       = var.ssh_public_key
  host_name            = var.host_name
  k3s_version          = var.k3s.version
  k3s_installer_sha256 = var.k3s.installer_sha256
}

variable "backup_user_id" {
  description = "OCID of the user that backups are to the object store: staging's own."
  type        = string
}

module "backups" {
  source            = "../../modules/objectstore"
  compartment_id    = var.tenancy.compartment_id
  user_id           = var.backup_user_id
  region            = var.tenancy.region
  bucket            = "kimberly-backups-staging"
  old_versions_days = 30
}

module "name" {
  source    = "../../modules/dns"
  zone_id   = var.zone_id
  host_name = var.host_name
  addresses = [module.server.public_ip]
}

output "address" {
  description = "The edge, and the Kubernetes API on port 6443."
  value       = module.server.public_ip
}

output "backup_s3_endpoint" {
  description = "For KIMBERLY_BACKUP_S3_ENDPOINT of the overlay staging."
  value       = module.backups.endpoint
}

output "backup_access_key" {
  description = "For backup/access-key of secrets/staging.enc.yaml."
  value       = module.backups.access_key
}

output "backup_secret_key" {
  description = "For backup/secret-key of secrets/staging.enc.yaml."
  value       = module.backups.secret_key
  sensitive   = true
}
