"""Other memory stores, measured on the same data, the same vectors and the same Postgres.

Each runs as a process of its own on the packages of requirements/peers.txt, in build/peers, so
that the project's environment stays as it is.
"""
