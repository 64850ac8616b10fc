"""``skipkernels compare``: runs every instruction in an executor and in the reference, and shows where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from skipkernels.cli import options as opt
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import ModelOptions, PolicyOptions
from skipkernels.errors import DeviceError
from skipkernels.support.console import out, print_json

if TYPE_CHECKING:
    from skipkernels.executors.comparison import Difference


@grouped
def compare(
    model_options: ModelOptions,
    prompt: opt.Prompt,
    policy_options: PolicyOptions,
    max_new_tokens: opt.MaxNewTokens = 4,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest difference, relative to the operand's magnitude, that is no error.", min=0.0),
    ] = 0.02,
    json: opt.Json = False,
) -> None:
    """Run every instruction of a short generation in the executor and in the reference, and show where they differ.

    Exit code 1 where a difference is larger than --tolerance. Slow: for debugging.
    """
    if model_options.executor == "reference":
        raise DeviceError("compare runs the reference beside another executor; leave --executor out")
    engine = model_options.load(neuron_rows=policy_options.needs_neuron_rows(model_options))
    policy = policy_options.choose(engine, model_options)
    comparison = engine.compare_with_reference(policy)
    (generation,) = engine.generate([prompt], max_new_tokens=max_new_tokens, policy=policy)
    worst = _worst_of_each(comparison.differences)
    beyond = [one for one in comparison.differences if one.relative > tolerance]
    if json:
        print_json(
            {
                "model": model_options.model,
                "executor": engine.execution.executor,
                "policy": policy.label,
                "text": generation.text,
                "tolerance": tolerance,
                "operands": [_document(one) for one in worst],
                "first_beyond": _document(beyond[0]) if beyond else None,
            }
        )
    else:
        out.print(_table(worst))
        out.print(_verdict(beyond, tolerance))
    if beyond:
        raise typer.Exit(1)


def _worst_of_each(differences: Iterable[Difference]) -> list[Difference]:
    """The largest difference of every op's every operand, in the order of the program."""
    worst: dict[tuple[str, str], Difference] = {}
    for one in differences:
        key = one.op, one.operand
        if key not in worst or one.relative > worst[key].relative:
            worst[key] = one
    return list(worst.values())


def _document(one: Difference) -> dict[str, Any]:
    return {
        "op": one.op,
        "operand": one.operand,
        "step": one.step,
        "instruction": one.index,
        "relative": one.relative,
    }


def _table(worst: list[Difference]) -> Table:
    table = Table("op", "operand", "largest difference", "in step", "instruction", box=None, pad_edge=False)
    for one in worst:
        table.add_row(one.op, one.operand, f"{one.relative:.1e}", str(one.step), str(one.index))
    return table


def _verdict(beyond: list[Difference], tolerance: float) -> str:
    if not beyond:
        return f"no difference beyond {tolerance:g} of the operand's magnitude"
    first = beyond[0]
    return (
        f"{len(beyond)} beyond {tolerance:g}; the first: {first.op} (instruction {first.index} of step {first.step}), "
        f"operand {first.operand}, {first.relative:.1e}"
    )
