"""The tools of others that look at what leads to a cluster, and how each is run."""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.rendering import EVERY_DOCUMENT, TOOLS
from local.layout import CHECKOUT

POLICIES: Final = CHECKOUT / "build" / "policies" / "bin"
MODELS: Final = CHECKOUT / "build" / "models"
PROMETHEUS: Final = CHECKOUT / "build" / "prometheus" / "usr" / "bin"
_CHECKOV: Final = CHECKOUT / "kustomize" / "checkov.yaml"
_NOT_OURS: Final = ("build", "third_party", ".venv", ".mesh")
"""What checkov need not look at: whatever has one of these in its path."""
_NO_SECRETS: Final = (
    # Whole names: what has build in its own is ours.
    *(rf"(^|/){name}(/|$)" for name in ("build", "third_party", r"\.venv", r"\.mesh")),
    r"(^|/)\.[a-z]+_cache(/|$)",
    # Names of secrets in Vault look as random as secrets do.
    r"^(\./)?kustomize/components/external-secrets/secrets\.yaml$",
    # Theirs look like secrets and open nothing. `deploy secrets check` looks at them, too.
    r"^(\./)?tests(/|$)",
)
"""Where checkov need not look for secrets, as expressions of paths."""
_WORKFLOWS: Final = ".github/workflows"


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool, and what it looks at."""

    program: Path
    arguments: tuple[str, ...] = ()
    pattern: str = ""
    """Files of the checkout that it is given; empty: it finds its own."""

    def command(self) -> list[str]:
        """Return the command, or nothing if there is nothing to look at."""
        files = (
            sorted(str(each.relative_to(CHECKOUT)) for each in CHECKOUT.glob(self.pattern))
            if (self.pattern)
            else []
        )
        if self.pattern and not files:
            return []
        return [str(self.program), *self.arguments, *files]


def _scanned(*frameworks: str, skipping: Sequence[str]) -> Tool:
    """Return checkov looking at the checkout, in ways that it calls frameworks."""
    return Tool(
        POLICIES / "checkov",
        (
            *("--directory", ".", "--framework", *frameworks),
            *(word for path in skipping for word in ("--skip-path", path)),
            *("--config-file", str(_CHECKOV)),
        ),
    )


FAST: Final = (
    Tool(TOOLS / "hadolint", ("--failure-threshold", "info"), "images/*/Dockerfile"),
    Tool(TOOLS / "actionlint", ("-shellcheck", str(TOOLS / "shellcheck")), f"{_WORKFLOWS}/*.yml"),
    Tool(
        TOOLS / "check-jsonschema",
        ("--builtin-schema", "vendor.github-workflows"),
        f"{_WORKFLOWS}/*.yml",
    ),
    Tool(
        TOOLS / "check-jsonschema",
        ("--builtin-schema", "custom.github-workflows-require-timeout"),
        f"{_WORKFLOWS}/*.yml",
    ),
    Tool(
        TOOLS / "check-jsonschema",
        ("--builtin-schema", "vendor.dependabot"),
        ".github/dependabot.yml",
    ),
    Tool(TOOLS / "zizmor", ("--offline", "--no-progress", "--quiet", ".github")),
    Tool(TOOLS / "shellcheck", ("--external-sources",), "*/*.sh"),
)
SLOW: Final = (
    # -P: the folder of the script is none to import from.
    Tool(POLICIES / "python", ("-P", "deploy/models.py", str(EVERY_DOCUMENT))),
    Tool(Path("node"), ("deploy/models.mjs", str(MODELS), str(EVERY_DOCUMENT))),
    Tool(
        POLICIES / "checkov",
        (
            *("--file", str(EVERY_DOCUMENT), "--framework", "kubernetes"),
            *("--config-file", str(_CHECKOV)),
        ),
    ),
    _scanned("dockerfile", "github_actions", "terraform", skipping=_NOT_OURS),
    # By itself it would look into files that hold configuration, and into no program.
    _scanned("secrets", "--enable-secret-scan-all-files", skipping=_NO_SECRETS),
)


_OBSERVING: Final = (
    Tool(
        PROMETHEUS / "promtool",
        ("check", "rules", "--lint=all", "--lint-fatal"),
        "observability/rules/*.yaml",
    ),
    Tool(
        PROMETHEUS / "promtool",
        ("check", "config", "--syntax-only"),
        "observability/prometheus.yaml",
    ),
    Tool(PROMETHEUS / "amtool", ("check-config",), "observability/full/alertmanager.yaml"),
)


def observing() -> tuple[Tool, ...]:
    """Return what looks at rules and configurations; nothing where Debian's packages are not."""
    return tuple(tool for tool in _OBSERVING if tool.program.exists())


def run(tools: Sequence[Tool]) -> Iterator[str]:
    """Run tools side by side and yield what those said that found something."""
    running = []
    for tool in tools:
        command = tool.command()
        if command:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=CHECKOUT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    for process in running:
        said, _ = process.communicate()
        if process.returncode:
            program = process.args[0]  # type: ignore[index] # a list, as it was given
            yield f"{Path(str(program)).name}:\n{said.strip()}"
