"""hf-compress env: add, list, remove."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from hf_compress.terminal import console, errors

env = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Environments of their own, for libraries that cannot share this one: build, show, remove.",
)
EnvironmentArgument = Annotated[str, typer.Argument(help="its name: see `hf-compress env list`")]


@env.command("add")
def env_add(name: EnvironmentArgument) -> None:
    """Build an environment from the pins that ship with hf_compress; the last line printed is its Python."""
    from hf_compress.environments import add

    try:
        python = add(name, say=lambda text: errors.print(escape(text), style="dim"))
    except KeyboardInterrupt:
        errors.print("\ninterrupted: nothing was left half-built; run the same command again")
        raise typer.Exit(130) from None
    print(python)  # noqa: T201  (alone on stdout and never wrapped, for scripts)


@env.command("list")
def env_list() -> None:
    """Print each environment, what it is for, and where it is when it was built."""
    from hf_compress.environments import environments, found

    for known in environments().values():
        console.print(f"[bold]{known.name}[/bold]: {escape(known.summary)}", highlight=False)
        console.print("  pins: " + ", ".join(known.all_pins), markup=False, highlight=False)
        if not known.built:
            console.print(f"  not built: {known.command} (about {known.megabytes / 1000:.1f} GB)", markup=False)
        for one in (f for f in found() if f.name == known.name):
            state = "stale, its pins are not ours: " if one.stale else ""
            console.print(
                f"  {state}{one.record['megabytes'] / 1000:.1f} GB in {one.folder}", markup=False, soft_wrap=True
            )


@env.command("remove")
def env_remove(name: EnvironmentArgument) -> None:
    """Delete an environment, those of earlier pins too."""
    from hf_compress.environments import remove

    for folder in remove(name):
        console.print(f"removed {folder}", markup=False, soft_wrap=True)
