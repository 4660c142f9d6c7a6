"""A real mesh whose processes are asked what they measure."""

from tests.e2e.conftest import user
from tests.mesh import channel, http, mesh, trust

__all__ = ["channel", "http", "mesh", "trust", "user"]
