# One k3s server on Oracle's arm machines.

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

variable "availability_domain" {
  description = "Where there is room for A1; \"Out of host capacity\" means to try another one, or later."
  type        = string
}

variable "subnet_id" {
  description = "Where the node is."
  type        = string
}

variable "security_group_id" {
  description = "What the node belongs to."
  type        = string
}

variable "image_id" {
  description = "OCID of an Ubuntu 24.04 image for aarch64 in the region."
  type        = string
}

variable "node" {
  description = "What the node has."
  type        = object({ ocpus = number, memory_gb = number, boot_volume_gb = number })
}

variable "ssh_public_key" {
  description = "Who may log in."
  type        = string
}

variable "host_name" {
  description = "Name under which the Kubernetes API is called."
  type        = string
}

variable "k3s_version" {
  description = "Such as v1.35.2+k3s1."
  type        = string

  validation {
    condition     = can(regex("^v1\\.[0-9]+\\.[0-9]+\\+k3s[0-9]+$", var.k3s_version))
    error_message = "A release of k3s, such as v1.35.2+k3s1."
  }
}

variable "k3s_installer_sha256" {
  description = "SHA-256 of the installation script of that release, which the node runs as root."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.k3s_installer_sha256))
    error_message = "64 hexadecimal digits."
  }
}

resource "oci_core_instance" "server" {
  compartment_id      = var.compartment_id
  availability_domain = var.availability_domain
  display_name        = "kimberly-server"
  shape               = "VM.Standard.A1.Flex"

  shape_config {
    ocpus         = var.node.ocpus
    memory_in_gbs = var.node.memory_gb
  }

  source_details {
    source_type             = "image"
    source_id               = var.image_id
    boot_volume_size_in_gbs = var.node.boot_volume_gb
  }

  create_vnic_details {
    subnet_id        = var.subnet_id
    nsg_ids          = [var.security_group_id]
    assign_public_ip = true
  }

  launch_options {
    is_pv_encryption_in_transit_enabled = true
  }

  # Instance metadata of version 1 answers whoever makes the node fetch a URL.
  instance_options {
    are_legacy_imds_endpoints_disabled = true
  }

  metadata = {
    ssh_authorized_keys = var.ssh_public_key
    user_data = base64encode(templatefile("${path.module}/cloud-init.yaml.tftpl", {
      host_name            = var.host_name
      k3s_version          = var.k3s_version
      k3s_installer_sha256 = var.k3s_installer_sha256
    }))
  }

  lifecycle {
    # A newer image or another script must not replace the machine that holds the data.
    ignore_changes  = [source_details[0].source_id, metadata["user_data"]]
    prevent_destroy = true
  }
}

output "public_ip" {
  description = "Address of the edge and of the Kubernetes API."
  value       = oci_core_instance.server.public_ip
}
