"""The options of ``skipkernels serve``, by what they decide."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from skipkernels.server.http.limits import RequestLimits

_SERVER_PANEL = "Server"
_LIMITS_PANEL = "Limits"
_SCHEDULING_PANEL = "Scheduling"
_CLUSTER_PANEL = "Cluster"


@dataclass(frozen=True)
class ServerOptions:
    """Where and for whom it serves."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER_PANEL)] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.", rich_help_panel=_SERVER_PANEL)] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SKIPKERNELS_API_KEY",
            show_envvar=True,
            help="What clients have to send as a bearer token.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None
    grace_s: Annotated[
        float,
        typer.Option(min=0.0, help="For accepted requests when the server is stopped.", rich_help_panel=_SERVER_PANEL),
    ] = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise typer.BadParameter("--api-key is empty, which would let in whoever sends nothing")

    @property
    def open_to_others(self) -> bool:
        """Whether other machines may reach it and need no key."""
        return self.api_key is None and self.host not in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class LimitOptions:
    """The fields of ``RequestLimits``; the last one stays as it is."""

    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.", rich_help_panel=_LIMITS_PANEL)] = 16 << 20
    max_parts: Annotated[
        int, typer.Option(min=1, max=1024, help="Of all messages of a request.", rich_help_panel=_LIMITS_PANEL)
    ] = 64
    max_image_pixels: Annotated[
        int, typer.Option(min=1, help="Of all images of a request.", rich_help_panel=_LIMITS_PANEL)
    ] = 1 << 24
    max_audio_s: Annotated[
        float, typer.Option(min=0.001, help="Of all recordings of a request.", rich_help_panel=_LIMITS_PANEL)
    ] = 120.0
    max_requests: Annotated[int, typer.Option(min=1, help="At one time.", rich_help_panel=_LIMITS_PANEL)] = 256

    def limits(self) -> RequestLimits:
        from skipkernels.server.http.limits import RequestLimits

        return RequestLimits(**dataclasses.asdict(self))


@dataclass(frozen=True)
class SchedulingOptions:
    """What decides how a request is answered."""

    skip_levels: Annotated[
        str | None,
        typer.Option(
            help="Shares of FFNs to skip, a strategy each; 0: dense. Default: 0,0.1,0.2,0.3, without those that the "
            "policy cannot hold.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A file of `skipkernels calibrate`, whose span, dense layers and warm-up all levels have; default: "
            "skip_policy.json in the model's folder, where there is one.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            help="What each strategy costs and achieves. A missing file is measured, thoroughly, and written. "
            "Default: measured quickly, and not kept.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to profile on; default: documentation of Python's standard library.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    samples: Annotated[
        Path | None,
        typer.Option(
            help='Chats to profile on instead, a JSON object in each line: "messages" as clients send them, and in all '
            'lines or in none the right answer, "expected".',
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    selection: Annotated[
        str, typer.Option(help="maximize, cheapest, random or full.", rich_help_panel=_SCHEDULING_PANEL)
    ] = "maximize"
    admission: Annotated[
        str,
        typer.Option(
            help="What is refused: accuracy, one that cannot be promised; deadline, also one that cannot be met.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = "accuracy"
    max_batch_size: Annotated[
        int, typer.Option(min=1, max=16, help="Requests that run together.", rich_help_panel=_SCHEDULING_PANEL)
    ] = 8
    batch_memory_mib: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="What a batch may take above the model; needs a profile from a file. Default: what was profiled.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.admission not in ("accuracy", "deadline"):
            raise typer.BadParameter(f"--admission must be accuracy or deadline, got {self.admission!r}")
        if self.text is not None and self.samples is not None:
            raise typer.BadParameter("--text and --samples both say what to profile on; give one")
        self.levels  # noqa: B018  # a wrong one is a wrong command line

    @property
    def levels(self) -> tuple[float, ...] | None:
        if self.skip_levels is None:
            return None
        try:
            return tuple(float(level) for level in self.skip_levels.split(","))
        except ValueError as error:
            raise typer.BadParameter(f"--skip-levels must be numbers like '0,0.2', got {self.skip_levels!r}") from error

    @property
    def runtime_options(self) -> dict[str, Any]:
        """Of ``Runtime``, beside the policy."""
        memory_bytes = None if self.batch_memory_mib is None else self.batch_memory_mib * 2**20
        return {"memory_bytes": memory_bytes, "admission": self.admission}


@dataclass(frozen=True)
class ClusterOptions:
    """Whether the model runs in this process or on Ray."""

    ray: Annotated[
        bool, typer.Option("--ray", help="Run the model in processes of Ray's.", rich_help_panel=_CLUSTER_PANEL)
    ] = False
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.", rich_help_panel=_CLUSTER_PANEL)] = 1
    ray_address: Annotated[
        str | None,
        typer.Option(help="A cluster to join; default: one of this machine alone.", rich_help_panel=_CLUSTER_PANEL),
    ] = None

    def __post_init__(self) -> None:
        if not self.ray and (self.replicas > 1 or self.ray_address is not None):
            raise typer.BadParameter("--replicas and --ray-address need --ray")
