"""What checkov is told finds a secret that somebody left in the checkout, wherever it is."""

import subprocess
from pathlib import Path

import pytest

from deploy import tools

pytestmark = pytest.mark.skipif(
    not (tools.POLICIES.parent / "installed").exists(),
    reason="make build/policies/installed brings checkov",
)
(COMMAND,) = [tool.command() for tool in tools.SLOW if "secrets" in tool.arguments]
# Put together, so that this file is none that holds them. They open nothing.
ACCESS_KEY = "AKIA" + "Z7XK3QF5M2N8R4TJ"
SECRET_KEY = "q8Zr2Lx" + "Vb4TnY7Kd1Wm5Jc9Hs3Gf6Pa0Ue+RiXoNt"
TOKEN = "ghp_" + "Rk3Vw8Zt1Xq6Ys9Lm2Pn5Bc7Hd4Jf0GaUeTo"
PLANTED = {
    "server/settings.py": f'ACCESS_KEY = "{ACCESS_KEY}"\n',
    "local/files.py": f'SECRET_KEY = "{SECRET_KEY}"\n',
    "deploy/push.sh": f"export GITHUB_TOKEN={TOKEN}\n",
    "images/build.sh": f"export GITHUB_TOKEN={TOKEN}\n",
    "terraform/main.tf": f'provider "aws" {{\n  access_key = "{ACCESS_KEY}"\n}}\n',
    "kustomize/base/config.yaml": f"kind: ConfigMap\ndata:\n  secret_key: {SECRET_KEY}\n",
    "kustomize/tests/all/config.yaml": f"kind: ConfigMap\ndata:\n  secret_key: {SECRET_KEY}\n",
}


def found_in(checkout: Path) -> tuple[int, str]:
    """Return how the look through a checkout ended, and what it said."""
    done = subprocess.run(COMMAND, cwd=checkout, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


def test_a_planted_secret_is_found_wherever_it_is(tmp_path: Path) -> None:
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code, said = found_in(tmp_path)
    assert code == 1
    assert {name for name in PLANTED if f"/{name}:" not in said} == set(), said


def test_what_tests_invent_and_what_is_not_ours_is_let_be(tmp_path: Path) -> None:
    for name in ("tests/a.py", "build/a.py", ".venv/a.py", ".pytest_cache/a"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f'ACCESS_KEY = "{ACCESS_KEY}"\n')
    assert found_in(tmp_path) == (0, "")


def test_where_nothing_is_planted_nothing_is_found(tmp_path: Path) -> None:
    for name in PLANTED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("access_key = given by the environment\n")
    assert found_in(tmp_path) == (0, "")
