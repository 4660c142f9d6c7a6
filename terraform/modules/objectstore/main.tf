# A bucket that is spoken to by its S3 interface: for attachments, transcripts and audit checkpoints,
# or for backups.

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

variable "old_versions_days" {
  description = "For how long versions are kept that were replaced or deleted; null: for ever."
  type        = number
  default     = null
  validation {
    condition     = var.old_versions_days == null ? true : var.old_versions_days >= 7
    error_message = "Within a week somebody has to notice what was deleted."
  }
}

data "oci_objectstorage_namespace" "mine" {
  compartment_id = var.compartment_id
}

resource "oci_objectstorage_bucket" "mesh" {
  #checkov:skip=CKV_OCI_9:Oracle's keys encrypt it; a key of ours that is lost would lose every object
  #checkov:skip=CKV_OCI_7:nobody would listen to its events
  compartment_id = var.compartment_id
  namespace      = data.oci_objectstorage_namespace.mine.namespace
  name           = var.bucket
  access_type    = "NoPublicAccess"
  versioning     = "Enabled"
}

# Oracle's own service deletes, if it may.
resource "oci_identity_policy" "lifecycle" {
  count          = var.old_versions_days == null ? 0 : 1
  compartment_id = var.compartment_id
  name           = "${var.bucket}-lifecycle"
  description    = "Lets old versions of ${var.bucket} go."
  statements = [
    "Allow service objectstorage-${var.region} to manage object-family in compartment id ${var.compartment_id}",
  ]
}

# By version and not by age: a backup of today names objects that were written a year ago.
resource "oci_objectstorage_object_lifecycle_policy" "old_versions" {
  count      = var.old_versions_days == null ? 0 : 1
  namespace  = data.oci_objectstorage_namespace.mine.namespace
  bucket     = oci_objectstorage_bucket.mesh.name
  depends_on = [oci_identity_policy.lifecycle]
  rules {
    name        = "old-versions"
    action      = "DELETE"
    is_enabled  = true
    target      = "previous-object-versions"
    time_amount = var.old_versions_days
    time_unit   = "DAYS"
  }
  rules {
    name        = "unfinished-uploads"
    action      = "ABORT"
    is_enabled  = true
    target      = "multipart-uploads"
    time_amount = 2
    time_unit   = "DAYS"
  }
}

# What S3 calls an access key. Its secret half is in Terraform's state: keep that as one keeps keys.
resource "oci_identity_customer_secret_key" "services" {
  user_id      = var.user_id
  display_name = var.bucket
}

output "endpoint" {
  description = "For the overlay: KIMBERLY_S3_ENDPOINT, or KIMBERLY_BACKUP_S3_ENDPOINT."
  value       = "${data.oci_objectstorage_namespace.mine.namespace}.compat.objectstorage.${var.region}.oraclecloud.com"
}

output "access_key" {
  description = "For access-key of the secret s3, or backup."
  value       = oci_identity_customer_secret_key.services.id
}

output "secret_key" {
  description = "For secret-key of the secret s3, or backup."
  value       = oci_identity_customer_secret_key.services.key
  sensitive   = true
}
