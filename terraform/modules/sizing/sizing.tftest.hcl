run "the_default_fits_into_always_free" {
  command = plan

  assert {
    condition     = output.nodes.ocpus == 2 && output.nodes.memory_gb == 12
    error_message = "one node takes all that is free"
  }
  assert {
    condition     = output.subnets == { nodes = "10.20.0.0/18", edge = "10.20.64.0/24", data = "10.20.128.0/18" }
    error_message = "the parts of the network have moved"
  }
}

run "two_small_nodes_fit_as_well" {
  command = plan
  variables {
    nodes = { count = 2, ocpus = 1, memory_gb = 6, boot_volume_gb = 50 }
  }
}

run "what_was_free_once_is_refused" {
  command = plan
  variables {
    nodes = { count = 1, ocpus = 4, memory_gb = 24, boot_volume_gb = 50 }
  }
  expect_failures = [var.nodes]
}

run "too_much_disk_is_refused" {
  command = plan
  variables {
    nodes = { count = 2, ocpus = 1, memory_gb = 6, boot_volume_gb = 150 }
  }
  expect_failures = [var.nodes]
}

run "too_small_a_node_is_refused" {
  command = plan
  variables {
    nodes = { count = 2, ocpus = 1, memory_gb = 4, boot_volume_gb = 50 }
  }
  expect_failures = [var.nodes]
}

run "who_pays_may_have_more" {
  command = plan
  variables {
    free  = false
    nodes = { count = 3, ocpus = 4, memory_gb = 24, boot_volume_gb = 100 }
  }
}

run "a_network_without_room_is_refused" {
  command = plan
  variables {
    network_cidr = "10.20.0.0/28"
  }
  expect_failures = [var.network_cidr]
}
