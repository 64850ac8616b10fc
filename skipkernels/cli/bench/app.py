"""``skipkernels bench``: ``decode``, the default, times decode steps; ``kernels`` times each op; ``serving`` compares
selection policies under load."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from skipkernels.cli.bench.decode import decode
from skipkernels.cli.bench.kernels import kernels
from skipkernels.cli.bench.serving import serving


class DecodeByDefault(TyperGroup):
    """``skipkernels bench --shapes ...`` is ``skipkernels bench decode --shapes ...``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["decode", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=DecodeByDefault, help="Time decoding beside what the memory allows.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Time decoding beside what the memory allows."""


app.command()(decode)
app.command()(kernels)
app.command()(serving)
