"""skip_policy.json: a calibrated policy, bound to the model it was calibrated on, with what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipkernels.errors import PolicyError
from skipkernels.skipping.fingerprint import belongs_to
from skipkernels.skipping.policy import Policy, policy_from_dict
from skipkernels.support.files import read_document

FORMAT = "skipkernels.skip_policy"
VERSIONS = (1, 2, 3)
"""What is read. 2: policies may hold thresholds for neurons; 3: and scales beside them."""


SHIPPED = Path(__file__).parent / "policies"
"""Policies that come with the package. They are bound to a model by the first part of its fingerprint, which every
quantisation of a checkpoint shares."""


def shipped_policies() -> list[str]:
    """Names that stand for the path of a policy file."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def save_policy(path: str | Path, policy: Policy, *, fingerprint: str, measured: dict[str, Any]) -> None:
    """Writes a policy file, of the first version that can hold the policy's thresholds; ``measured`` is kept for people
    and tables, and not read back."""
    values = policy.to_dict()
    document = {
        "format": FORMAT,
        "version": 3 if "up_scales" in values else 2,
        "model_fingerprint": fingerprint,
        "policy": values,
        "measured": measured,
    }
    try:
        Path(path).write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be written ({error.strerror})") from error


def load_policy(path: str | Path, *, fingerprint: str | None = None) -> Policy:
    """Reads a policy file, or the one of ``shipped_policies`` of this name. With ``fingerprint``, only one that was
    made for that model.

    Raises:
        PolicyError: unreadable, another format or version, or another model's.
    """
    document = read_policy_file(path)
    made_for = document.get("model_fingerprint")
    if fingerprint is not None and not belongs_to(made_for, fingerprint):
        raise PolicyError(
            f"{path}: was calibrated for another model (fingerprint {made_for}, this model's is {fingerprint}); "
            "run `skipkernels calibrate` on this model"
        )
    values = document.get("policy")
    if not isinstance(values, dict):
        raise PolicyError(f"{path}: holds no 'policy' object")
    try:
        return policy_from_dict(values)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def read_policy_file(path: str | Path) -> dict[str, Any]:
    """The whole document, checked for format and version only."""
    if str(path) in shipped_policies() and not Path(path).is_file():  # a model's folder may have the name too
        path = SHIPPED / f"{path}.json"
    try:
        return read_document(path, "policy file", FORMAT, VERSIONS, PolicyError)
    except PolicyError as error:
        if Path(path).exists():
            raise
        raise PolicyError(f"{error}; with the package come {', '.join(shipped_policies())}") from error
