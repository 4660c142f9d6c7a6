"""python -m kimberly.cli: the `kimberly` command without an installation."""

from kimberly.cli import app

app(prog_name="kimberly")
