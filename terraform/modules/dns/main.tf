# Names of the edge, and who may issue certificates for them.

terraform {
  required_version = ">= 1.6"
  required_providers {
    cloudflare = { source = "cloudflare/cloudflare", version = "~> 5.0" }
  }
}

variable "zone_id" {
  description = "Zone at Cloudflare."
  type        = string
}

variable "host_name" {
  description = "Such as api.kimberly.example: KIMBERLY_HOST_NAMES of the overlay."
  type        = string
}

variable "addresses" {
  description = "IPv4 addresses of the edge."
  type        = list(string)

  validation {
    condition     = length(var.addresses) > 0
    error_message = "There must be one."
  }
}

resource "cloudflare_dns_record" "edge" {
  for_each = toset(var.addresses)

  zone_id = var.zone_id
  name    = var.host_name
  type    = "A"
  content = each.value
  ttl     = 300
  # gRPC ends at our own Envoy, with its own certificate.
  proxied = false
}

resource "cloudflare_dns_record" "issuers" {
  zone_id = var.zone_id
  name    = var.host_name
  type    = "CAA"
  ttl     = 3600
  data = {
    flags = 0
    tag   = "issue"
    value = "letsencrypt.org"
  }
}
