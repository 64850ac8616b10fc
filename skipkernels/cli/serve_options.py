"""The options of ``skipkernels serve``, by what they decide."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from skipkernels.cli.models import ModelOptions
    from skipkernels.server.http.limits import RequestLimits

_SERVER_PANEL = "Server"
_LIMITS_PANEL = "Limits"
_SCHEDULING_PANEL = "Scheduling"
_CLUSTER_PANEL = "Cluster"


@dataclass(frozen=True)
class ServerOptions:
    """The address, the key and the shutdown."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER_PANEL)] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.", rich_help_panel=_SERVER_PANEL)] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SKIPKERNELS_API_KEY",
            show_envvar=True,
            help="Bearer token that clients have to send.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="What clients call the model; default: the name of its folder, or its hub id.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse fields that are not known, instead of ignoring them with a header that names them.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = False
    cors_origins: Annotated[
        str | None,
        typer.Option(
            help="Origins of web pages that may use this server, like https://example.org,https://example.com; *: all.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None
    grace_s: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds that accepted requests have left after a signal.", rich_help_panel=_SERVER_PANEL
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise typer.BadParameter("--api-key is empty: give a key, or leave the option out")

    @property
    def service_options(self) -> dict[str, Any]:
        """Keyword arguments of ``Service``."""
        origins = tuple(origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip())
        return {"api_key": self.api_key, "strict": self.strict, "cors_origins": origins}

    def name_of(self, model: ModelOptions) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        folder = Path(model.model)
        return folder.resolve().name if folder.exists() else model.model

    @property
    def open_to_others(self) -> bool:
        """Whether other machines can connect without a key."""
        return self.api_key is None and self.host not in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class LimitOptions:
    """The fields of ``RequestLimits``, except ``client_timeout_s``."""

    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum size of a request.", rich_help_panel=_LIMITS_PANEL)
    ] = 16 << 20
    max_parts: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="Maximum number of parts in all messages of a request.", rich_help_panel=_LIMITS_PANEL
        ),
    ] = 64
    max_image_pixels: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of pixels in all images of a request.", rich_help_panel=_LIMITS_PANEL),
    ] = 1 << 24
    max_audio_s: Annotated[
        float,
        typer.Option(min=0.001, help="Maximum duration of all recordings of a request.", rich_help_panel=_LIMITS_PANEL),
    ] = 120.0
    max_requests: Annotated[
        int, typer.Option(min=1, help="Maximum concurrent requests.", rich_help_panel=_LIMITS_PANEL)
    ] = 256

    def limits(self) -> RequestLimits:
        from skipkernels.server.http.limits import RequestLimits

        return RequestLimits(**dataclasses.asdict(self))


@dataclass(frozen=True)
class SchedulingOptions:
    """Strategies, profile, and how requests are scheduled."""

    skip_levels: Annotated[
        str | None,
        typer.Option(
            help="Shares of FFN bytes to leave out, one strategy each; 0: dense. Default: those of 0,0.1,0.2,0.3 that "
            "the policy can hold. 0 alone loads the weights for dense steps only, which are faster then.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            help="A policy file of `skipkernels calibrate`, held at every level; or several, each a level of its own. "
            "Default: skip_policy.json in the model's folder, if any; else single neurons are left out of float "
            "weights on a CPU, by thresholds that are measured in idle time.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            help="File with the cost and accuracy of each strategy. If it is missing, a thorough profile is measured "
            "and written. Default: the dense model is served at once, and the other strategies join when "
            "they have been measured in idle time.",
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
            help='Chats to profile on instead, a JSON object per line: "messages" as clients send them, and the right '
            'answer, "expected", in all lines or in none.',
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None
    selection: Annotated[
        str,
        typer.Option(help="Selection policy: maximize, cheapest, random or full.", rich_help_panel=_SCHEDULING_PANEL),
    ] = "maximize"
    admission: Annotated[
        str,
        typer.Option(
            help="Jobs to refuse. accuracy: those whose accuracy cannot be promised; deadline: also those whose "
            "deadline cannot be met.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = "accuracy"
    max_batch_size: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Maximum number of requests that share a step.", rich_help_panel=_SCHEDULING_PANEL
        ),
    ] = 16
    batch_memory_mib: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Memory that a batch may take on top of the model; needs a profile from a file. Default: what was "
            "profiled.",
            rich_help_panel=_SCHEDULING_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.admission not in ("accuracy", "deadline"):
            raise typer.BadParameter(f"--admission must be accuracy or deadline, got {self.admission!r}")
        if self.text is not None and self.samples is not None:
            raise typer.BadParameter("--text and --samples are both what to profile on; give one")
        self.levels  # noqa: B018  # checks the option

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
        """Keyword arguments of ``Runtime``, besides the selection policy."""
        memory_bytes = None if self.batch_memory_mib is None else self.batch_memory_mib * 2**20
        return {"memory_bytes": memory_bytes, "admission": self.admission}


@dataclass(frozen=True)
class ClusterOptions:
    """Whether the model runs in this process or on Ray."""

    ray: Annotated[
        bool,
        typer.Option("--ray", help="Run the model on Ray, in processes of its own.", rich_help_panel=_CLUSTER_PANEL),
    ] = False
    replicas: Annotated[
        int, typer.Option(min=1, help="Number of copies of the model.", rich_help_panel=_CLUSTER_PANEL)
    ] = 1
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join; default: start one on this machine.", rich_help_panel=_CLUSTER_PANEL),
    ] = None

    def __post_init__(self) -> None:
        if not self.ray and (self.replicas > 1 or self.ray_address is not None):
            raise typer.BadParameter("--replicas and --ray-address need --ray")
