"""The whole mesh on one machine, without Docker."""
