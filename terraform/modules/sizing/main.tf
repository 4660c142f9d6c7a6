# How large the machines are and how the network is divided. No provider: tested by `terraform test`
# wherever there is a terraform.

terraform {
  required_version = ">= 1.6"
}

variable "free" {
  description = "Whether everything must fit into Oracle's Always Free, as of 2026-06-15."
  type        = bool
  default     = true
}

variable "nodes" {
  description = "Arm nodes: how many, and what each has."
  type = object({
    count          = number
    ocpus          = number
    memory_gb      = number
    boot_volume_gb = number
  })
  default = { count = 1, ocpus = 2, memory_gb = 12, boot_volume_gb = 100 }

  validation {
    condition     = var.nodes.count >= 1 && var.nodes.ocpus >= 1 && var.nodes.memory_gb >= 6
    error_message = "There must be a node, with a core and 6 GB at least: less does not hold the mesh."
  }

  # Until June 2026 it was 4 and 24; guides and modules that say so now cost money.
  validation {
    condition     = !var.free || var.nodes.count * var.nodes.ocpus <= 2
    error_message = "Always Free has 2 OCPU of A1 in all."
  }

  validation {
    condition     = !var.free || var.nodes.count * var.nodes.memory_gb <= 12
    error_message = "Always Free has 12 GB of memory on A1 in all."
  }

  validation {
    condition     = !var.free || var.nodes.count * var.nodes.boot_volume_gb <= 200
    error_message = "Always Free has 200 GB of block storage in all, boot volumes included."
  }

  validation {
    condition     = var.nodes.boot_volume_gb >= 50
    error_message = "A boot volume has 50 GB at least."
  }
}

variable "network_cidr" {
  description = "Addresses of the virtual network."
  type        = string
  default     = "10.20.0.0/16"

  validation {
    condition     = can(cidrsubnet(var.network_cidr, 8, 1))
    error_message = "It must be a network with room for 256 subnets, such as 10.20.0.0/16."
  }
}

locals {
  # The upper half is for data: kustomize/overlays/prod lets services into the first half of it.
  nodes_cidr = cidrsubnet(var.network_cidr, 2, 0)
  edge_cidr  = cidrsubnet(var.network_cidr, 8, 64)
  data_cidr  = cidrsubnet(var.network_cidr, 2, 2)
}

output "nodes" {
  description = "The nodes, checked."
  value       = var.nodes
}

output "network_cidr" {
  description = "Addresses of the virtual network."
  value       = var.network_cidr
}

output "subnets" {
  description = "Addresses of its parts: nodes, the edge's load balancer, managed stores."
  value       = { nodes = local.nodes_cidr, edge = local.edge_cidr, data = local.data_cidr }
}
