"""``skipkernels compare``: runs every instruction in an executor and in the reference, and shows where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import ModelOptions, PolicyOptions
from skipkernels.errors import DeviceError
from skipkernels.support.console import out, print_json, table

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
                "operands": [asdict(one) for one in worst],
                "first_beyond": asdict(beyond[0]) if beyond else None,
            }
        )
    else:
        _print_table(worst)
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


def _print_table(worst: list[Difference]) -> None:
    rows = table("op", "operand", "largest difference", "step", "instruction")
    for one in worst:
        rows.add_row(one.op, one.operand, f"{one.relative:.1e}", str(one.step), str(one.instruction))
    out.print(rows)


def _verdict(beyond: list[Difference], tolerance: float) -> str:
    if not beyond:
        return f"no difference beyond {tolerance:g} of the operand's magnitude"
    first = beyond[0]
    where = f"{first.op} (instruction {first.instruction} of step {first.step}), operand {first.operand}"
    return f"{len(beyond)} beyond {tolerance:g}; the first: {where}, {first.relative:.1e}"
