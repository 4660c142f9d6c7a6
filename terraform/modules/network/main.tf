# The virtual network: a public subnet (Always Free has no NAT gateway), closed but for three doors.

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

variable "cidr" {
  description = "Addresses of the network."
  type        = string
}

variable "nodes_cidr" {
  description = "Addresses of the nodes."
  type        = string
}

variable "administrators" {
  description = "Networks from which the nodes and the Kubernetes API may be reached."
  type        = set(string)

  validation {
    condition     = !contains(var.administrators, "0.0.0.0/0")
    error_message = "Not from everywhere."
  }
}

resource "oci_core_vcn" "mesh" {
  compartment_id = var.compartment_id
  cidr_blocks    = [var.cidr]
  display_name   = "kimberly"
  dns_label      = "kimberly"
}

resource "oci_core_internet_gateway" "mesh" {
  compartment_id = var.compartment_id
  vcn_id         = oci_core_vcn.mesh.id
}

resource "oci_core_route_table" "mesh" {
  compartment_id = var.compartment_id
  vcn_id         = oci_core_vcn.mesh.id

  route_rules {
    destination       = "0.0.0.0/0"
    network_entity_id = oci_core_internet_gateway.mesh.id
  }
}

# Nothing by this list, which holds for all of a subnet: the doors are in the group below.
resource "oci_core_security_list" "nothing" {
  #checkov:skip=CKV_OCI_16:it lets nothing in, and so has no rule
  #checkov:skip=CKV_OCI_19:it lets nothing in
  compartment_id = var.compartment_id
  vcn_id         = oci_core_vcn.mesh.id
}

resource "oci_core_subnet" "nodes" {
  compartment_id    = var.compartment_id
  vcn_id            = oci_core_vcn.mesh.id
  cidr_block        = var.nodes_cidr
  display_name      = "nodes"
  dns_label         = "nodes"
  route_table_id    = oci_core_route_table.mesh.id
  security_list_ids = [oci_core_security_list.nothing.id]
}

resource "oci_core_network_security_group" "nodes" {
  compartment_id = var.compartment_id
  vcn_id         = oci_core_vcn.mesh.id
  display_name   = "nodes"
}

resource "oci_core_network_security_group_security_rule" "https" {
  #checkov:skip=CKV_OCI_21:without state, answers would need doors that stand open to everybody
  network_security_group_id = oci_core_network_security_group.nodes.id
  description               = "The edge."
  direction                 = "INGRESS"
  protocol                  = "6"
  source                    = "0.0.0.0/0"

  tcp_options {
    destination_port_range {
      min = 443
      max = 443
    }
  }
}

resource "oci_core_network_security_group_security_rule" "administration" {
  #checkov:skip=CKV_OCI_21:without state, answers would need doors that stand open to everybody
  for_each = { for pair in setproduct(var.administrators, [22, 6443]) : join("-", pair) => pair }

  network_security_group_id = oci_core_network_security_group.nodes.id
  description               = "SSH, and the Kubernetes API."
  direction                 = "INGRESS"
  protocol                  = "6"
  source                    = each.value[0]

  tcp_options {
    destination_port_range {
      min = tonumber(each.value[1])
      max = tonumber(each.value[1])
    }
  }
}

resource "oci_core_network_security_group_security_rule" "between_nodes" {
  #checkov:skip=CKV_OCI_21:without state, answers would need doors that stand open to everybody
  #checkov:skip=CKV2_OCI_2:from this group alone
  network_security_group_id = oci_core_network_security_group.nodes.id
  direction                 = "INGRESS"
  protocol                  = "all"
  source                    = oci_core_network_security_group.nodes.id
  source_type               = "NETWORK_SECURITY_GROUP"
}

resource "oci_core_network_security_group_security_rule" "out" {
  #checkov:skip=CKV2_OCI_2:it lets nothing in
  network_security_group_id = oci_core_network_security_group.nodes.id
  direction                 = "EGRESS"
  protocol                  = "all"
  destination               = "0.0.0.0/0"
}

output "subnet_id" {
  description = "Where the nodes are."
  value       = oci_core_subnet.nodes.id
}

output "security_group_id" {
  description = "What nodes belong to."
  value       = oci_core_network_security_group.nodes.id
}
