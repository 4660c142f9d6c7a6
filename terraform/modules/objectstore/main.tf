# The bucket for attachments, transcripts and audit checkpoints, spoken to by its S3 interface.

terraform {
  required_version = ">= 1.6"
  required_providers {
    oci = { source = "oracle/oci", version = "~> 7.0" }
  }
}

variable "compartment_id" {
  description = "OCID of the compartment."
  type        = string
}

variable "user_id" {
  description = "OCID of the user that the services are to the object store."
  type        = string
}

variable "region" {
  description = "Such as eu-frankfurt-1."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket."
  type        = string
  default     = "kimberly"
}

data "oci_objectstorage_namespace" "mine" {
  compartment_id = var.compartment_id
}

resource "oci_objectstorage_bucket" "mesh" {
  compartment_id = var.compartment_id
  namespace      = data.oci_objectstorage_namespace.mine.namespace
  name           = var.bucket
  access_type    = "NoPublicAccess"
  versioning     = "Enabled"
}

# What S3 calls an access key. Its secret half is in Terraform's state: keep that as one keeps keys.
resource "oci_identity_customer_secret_key" "services" {
  user_id      = var.user_id
  display_name = "kimberly services"
}

output "endpoint" {
  description = "For KIMBERLY_S3_ENDPOINT of kustomize/overlays/free."
  value       = "${data.oci_objectstorage_namespace.mine.namespace}.compat.objectstorage.${var.region}.oraclecloud.com"
}

output "access_key" {
  description = "For s3/access-key of secrets/free.enc.yaml."
  value       = oci_identity_customer_secret_key.services.id
}

output "secret_key" {
  description = "For s3/secret-key of secrets/free.enc.yaml."
  value       = oci_identity_customer_secret_key.services.key
  sensitive   = true
}
