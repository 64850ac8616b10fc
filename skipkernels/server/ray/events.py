"""Messages from other processes: plain data only, because exceptions may fail to unpickle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipkernels.chat.chat import ChatFormat
from skipkernels.modality.strategy import Strategy


@dataclass(frozen=True)
class Pieces:
    """New text of a running batch: (position in the batch, text), in order."""

    texts: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Outputs:
    """The outputs of a batch."""

    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class ModelFailure:
    """The model raised; ``refused``: because it cannot serve a request of the batch."""

    reason: str
    refused: bool = False


@dataclass(frozen=True)
class JobFailure:
    """A job was refused or failed; fields as in ``HttpError``."""

    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """What a replica serves: the attributes of its ``ChatModel``."""

    name: str
    fingerprint: str
    device: str
    dtype: str
    modalities: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    format: ChatFormat
