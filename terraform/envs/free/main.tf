# Everything in Oracle's Always Free: one arm node with k3s, a bucket, a name.

terraform {
  # This backend came with 1.12; the state holds the secret key of the bucket.
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
    user_id             = string
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

module "objects" {
  source         = "../../modules/objectstore"
  compartment_id = var.tenancy.compartment_id
  user_id        = var.tenancy.user_id
  region         = var.tenancy.region
}

variable "backup_user_id" {
  description = "OCID of the user that backups are to the object store: another one than the services."
  type        = string
}

module "backups" {
  source            = "../../modules/objectstore"
  compartment_id    = var.tenancy.compartment_id
  user_id           = var.backup_user_id
  region            = var.tenancy.region
  bucket            = "kimberly-backups"
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

output "s3_endpoint" {
  description = "For the overlay free."
  value       = module.objects.endpoint
}

output "s3_access_key" {
  description = "For secrets/free.enc.yaml."
  value       = module.objects.access_key
}

output "s3_secret_key" {
  description = "For secrets/free.enc.yaml."
  value       = module.objects.secret_key
  sensitive   = true
}

output "backup_access_key" {
  description = "For backup/access-key of secrets/free.enc.yaml."
  value       = module.backups.access_key
}

output "backup_secret_key" {
  description = "For backup/secret-key of secrets/free.enc.yaml."
  value       = module.backups.secret_key
  sensitive   = true
}
