"""python -m bench: measure a mesh of its own, durable, on this machine, and print the table."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console

from bench import calls, standing
from bench.pace import pace
from bench.table import Markdown, Row, show
from local.layout import Layout
from local.mesh import Mesh

app = typer.Typer(add_completion=False)


@app.command()
def main(
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure calls, start-up and memory. Let nothing else run meanwhile; it takes a minute."""
    console = Console()
    with console.status("measuring …"):
        rows = asyncio.run(_measure())
    show(rows, markdown=markdown)


async def _measure() -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        state = Path(directory)
        rows = [pace(), *await standing.start_up(state)]
        async with Mesh(Layout(state)) as mesh:
            await mesh.wait_ready()
            rows += await calls.run(mesh)
            rows += standing.resident(mesh)
        return [*rows, pace()]


if __name__ == "__main__":
    app()
