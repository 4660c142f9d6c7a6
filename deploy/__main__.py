"""`python -m deploy`: renders and checks manifests, pins images, keeps secrets."""

import os
import ssl
import subprocess
import sys
from contextlib import nullcontext
from getpass import getuser
from pathlib import Path
from typing import Annotated

import typer

from deploy import fly, images, observing, rendering, secrets, tools, vault
from deploy.forwarding import Unreachable, forwarded
from deploy.gate import Refused, watch
from deploy.invariants import problems, spread, unpinned
from deploy.manifests import Manifests
from deploy.smoke import Account, Failed, smoke
from server.clock import utc_now

app = typer.Typer(
    help="What stands between the checkout and a cluster.",
    no_args_is_help=True,
    add_completion=False,
)

kept = typer.Typer(help="Secrets: made, encrypted, rotated, checked.", no_args_is_help=True)
app.add_typer(kept, name="secrets")
flown = typer.Typer(help="What deploy/fly.sh asks for.", no_args_is_help=True)
app.add_typer(flown, name="fly")

_SOPS = rendering.TOOLS / "sops"


@app.command("render")
def render_command(
    names: Annotated[list[str] | None, typer.Argument(help="Overlays; none: all of them.")] = None,
    *,
    released: Annotated[
        bool, typer.Option(help="Refuse images that are not pinned by digest.")
    ] = False,
) -> None:
    """Render overlays to build/render/NAME.yaml and check them."""
    rendering.RENDERED.mkdir(parents=True, exist_ok=True)
    found: list[str] = []
    every = []
    for name, path in rendering.targets().items():
        if names and name not in names:
            continue
        text = rendering.render(path)
        (rendering.RENDERED / f"{name}.yaml").write_text(text)
        manifests = Manifests.parse(text)
        every.append(manifests)
        found += [f"{name}: {each}" for each in problems(manifests, rendering.secrets_of(name))]
        if name in rendering.ZONES:
            found += [f"{name}: {each}" for each in spread(manifests, rendering.ZONES[name])]
        if released:
            found += [f"{name}: {each} is not pinned by digest" for each in unpinned(manifests)]
    found += rendering.problems_of_schema(every)
    _end(found, f"{len(every)} overlays, Kubernetes {', '.join(rendering.VERSIONS)}")


@app.command("lint")
def lint_command() -> None:
    """Check images, workflows, scripts, rules and dashboards: all of it that takes seconds."""
    observing_tools = tools.observing()
    found = [*observing.drifted(), *tools.run((*tools.FAST, *observing_tools))]
    if not observing_tools and os.environ.get("GITHUB_ACTIONS") == "true":
        found.append("there is no promtool: make build/prometheus/installed")
    rules = "rules" if observing_tools else "without promtool, which Debian's package has"
    _end(found, f"images, workflows, scripts, {rules}", "delivery")


@app.command("observe")
def observe_command() -> None:
    """Make rules and dashboards anew from what describes them."""
    observing.write()


@app.command("policies")
def policies_command() -> None:
    """Check what `render` left in build/render, images, workflows and Terraform by policies."""
    found = list(tools.run(tools.SLOW))
    _end(found, "checkov, models of custom resources", "policies")


@app.command("smoke")
def smoke_command(
    edge: Annotated[str, typer.Argument(help="Such as https://api.staging.kimberly.example")],
    ca: Annotated[Path | None, typer.Option(help="The authority that signed its name.")] = None,
    email: Annotated[str, typer.Option(envvar="SMOKE_EMAIL", help="Log in as this user.")] = "",
    password: Annotated[
        str, typer.Option(envvar="SMOKE_PASSWORD", help="With this password.")
    ] = "",
) -> None:
    """Have a mesh do its main job once, for a new user or for one who signed up for that."""
    account = Account(email, password) if email else None
    trust = ssl.create_default_context(cafile=ca) if ca else None
    try:
        took = smoke(edge, trust, account=account)
    except Failed as error:
        _end([str(error)], "")
    _end([], took, "smoke")


@app.command("gate")
def gate_command(
    prometheus: Annotated[
        str, typer.Argument(help="Its URL; none: that of the cluster that kubectl speaks to.")
    ] = "",
    *,
    minutes: float = 10.0,
) -> None:
    """Fail if an alert that pages fires within some minutes."""
    reached = nullcontext(prometheus) if prometheus else forwarded("prometheus", 9090)
    try:
        with reached as url:
            looked = watch(url, seconds=minutes * 60)
    except (Refused, Unreachable) as error:
        _end([str(error)], "")
    _end([], f"nothing fired in {looked} looks", "gate")


@app.command("pin")
def pin_command(
    pins: Annotated[list[str], typer.Argument(help="Such as kimberly=sha256:….")],
) -> None:
    """Have the manifests name images by digest, as a release does."""
    text = images.FILE.read_text()
    for pin in pins:
        name, _, digest = pin.partition("=")
        try:
            text = images.pinned(text, name, digest)
        except ValueError as error:
            _end([str(error)], "")
    images.FILE.write_text(text)


@kept.command("new")
def new_command(environment: str) -> None:
    """Make the secrets of an environment and encrypt them to secrets/ENVIRONMENT.recipients.

    Where that names nobody yet, it names you, by a key of age that is made if you have none.
    """
    file = _file(environment)
    if file.exists():
        _end([f"{file.name} is there; see rotate"], "")
    named = secrets.DIRECTORY / f"{environment}.recipients"
    if not named.exists():
        named.write_text("".join(f"{key}  # {getuser()}\n" for key in secrets.own_keys()))
    recipients = secrets.recipients_of(environment, secrets.DIRECTORY)
    secrets.encrypt(secrets.new_values(environment), file, recipients, _SOPS)
    for problem in secrets.problems_of(secrets.DIRECTORY):
        typer.echo(problem)


@kept.command("rotate")
def rotate_command(environment: str, name: str) -> None:
    """Make one secret anew: in Vault, or for whom secrets/ENVIRONMENT.recipients names now."""
    try:
        if environment in rendering.WITHOUT_SECRETS:
            _rotate_in_vault(name)
        else:
            _rotate_in_file(environment, name)
    except KeyError:
        _end([f"{name} is not ours to make: see secrets/README.md"], "")


def _rotate_in_file(environment: str, name: str) -> None:
    file = _file(environment)
    values = secrets.rotated(secrets.decrypt(file, _SOPS), name)
    recipients = secrets.recipients_of(environment, secrets.DIRECTORY)
    secrets.encrypt(values, file, recipients, _SOPS)


def _rotate_in_vault(name: str) -> None:
    values = vault.read()
    for each, keys in secrets.rotated(values, name).items():
        if keys != values[each]:
            vault.write(each, keys)


@kept.command("check")
def check_command() -> None:
    """Check that nothing in the checkout can be read that should not be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], check=True, stdout=subprocess.PIPE, text=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    found = [*secrets.problems_of(secrets.DIRECTORY), *secrets.plain(files)]
    _end(found, f"no secret in {len(files)} files", "secrets")


@flown.command("secrets")
def fly_secrets_command(
    *,
    prefix: Annotated[str, typer.Option(help="What the names of all apps begin with.")],
    host_name: Annotated[str, typer.Option(help="By which clients call the edge.")],
) -> None:
    """Print the secrets of all apps, a line each: APP NAME=VALUE."""
    values, now = secrets.decrypt(_file("fly"), _SOPS), utc_now()
    try:
        for name in fly.APPS:
            told = fly.variables(name, values, prefix=prefix, host_name=host_name, now=now)
            typer.echo(fly.lines(name, told), nl=False)
    except fly.NotGiven as error:
        _end([str(error)], "")


@flown.command("images")
def fly_images_command() -> None:
    """Print the images of all apps by their digests, a line each: NAME IMAGE."""
    try:
        for name in fly.IMAGES:
            typer.echo(f"{name} {fly.image(name)}")
    except fly.NotPinned as error:
        _end([str(error)], "")


def _file(environment: str) -> Path:
    return secrets.DIRECTORY / f"{environment}.enc.yaml"


def _end(found: list[str], checked: str, what: str = "manifests") -> None:
    for problem in found:
        typer.echo(problem, err=True)
    if found:
        sys.exit(1)
    typer.echo(f"{what:9} ok ({checked})")


if __name__ == "__main__":
    app(prog_name="python -m deploy")
