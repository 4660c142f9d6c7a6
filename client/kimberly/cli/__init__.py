"""The `kimberly` command: one module a group of commands."""

import typer

from kimberly.cli import agents, audit, backups, jobs, meditations, profile, status, tenants

app = typer.Typer(
    help=(
        "Speaks to a memory mesh as one user.\n\n"
        "Every command needs the address of the mesh and an access token; see the options of "
        "each. Exit status: 0 what was asked for is so, 1 it is not, 2 it could not be told."
    ),
    no_args_is_help=True,
    # Paragraphs are filled anew for the width of the terminal.
    rich_markup_mode="markdown",
    # Tracebacks show values, and values are tokens.
    pretty_exceptions_enable=False,
)
app.add_typer(agents.app, name="agents")
app.add_typer(audit.app, name="audit")
app.command(
    # Its help, too, is the server's.
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(backups.backup)
app.add_typer(tenants.invitations, name="invitations")
app.add_typer(jobs.app, name="jobs")
app.command()(meditations.meditate)
app.add_typer(meditations.app, name="meditations")
app.add_typer(tenants.app, name="tenants")
app.add_typer(profile.app, name="profile")
app.command()(status.status)
