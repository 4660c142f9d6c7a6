"""The services of the memory mesh: auth, memory, jobs. One image, one process a service."""
