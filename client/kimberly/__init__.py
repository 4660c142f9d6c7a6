"""What users of the memory mesh import: generated stubs, a small client and the CLI."""
