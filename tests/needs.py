"""What a test needs that not every machine has. On GitHub nothing is skipped."""

import os
import shutil
from pathlib import Path

import pytest

from deploy import rendering, tools


def needs(program: Path | str, remedy: str) -> pytest.MarkDecorator:
    """Skip where a program is not; on GitHub the test runs, and fails for want of it.

    Args:
        program: Its path, or its name in PATH.
        remedy: What brings it.
    """
    is_wanted = os.environ.get("GITHUB_ACTIONS") == "true" or shutil.which(program) is not None
    return pytest.mark.skipif(not is_wanted, reason=remedy)


needs_kustomize = needs(
    rendering.TOOLS / "kubectl", "make build/deploy/installed brings kustomize and sops"
)
needs_prometheus = needs(
    tools.PROMETHEUS / "prometheus",
    "make build/prometheus/installed brings Prometheus and its tools, on Debian",
)
needs_terraform = needs("terraform", "there is no terraform here")
