"""``skipkernels serve``: a model behind OpenAI's HTTP interface, under deadlines and accuracy requirements."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from skipkernels.cli.groups import grouped
from skipkernels.cli.models import POLICY_FILE, ModelOptions
from skipkernels.cli.serve_options import ClusterOptions, LimitOptions, SchedulingOptions, ServerOptions
from skipkernels.cli.serve_profile import IdleProfiling, first_profile, kept_profile, measure_levels, needless
from skipkernels.errors import SkipkernelsError
from skipkernels.support.console import count, err, progress_bar, require_folder, stage, table
from skipkernels.support.files import read_text

if TYPE_CHECKING:
    from skipkernels.chat.chat import ChatFormat, ChatModel
    from skipkernels.chat.loading import ChatModelLoader
    from skipkernels.chat.text_model import TextModel
    from skipkernels.modality.profile import Profile
    from skipkernels.server.http.backend import Backend
    from skipkernels.server.http.samples import ChatLine
    from skipkernels.server.http.service import Service

Measure = Callable[..., "Profile"]
"""Called with a ``ChatModel``, and optionally ``progress``."""
Chats = list["ChatLine"] | None
"""What to profile on; None: text."""


@dataclass(frozen=True)
class Served:
    """What the HTTP server needs of a model, here or on Ray."""

    profile: Profile
    format: ChatFormat
    backend: Backend
    started: Callable[[Service], None] = lambda service: None


@grouped
def serve(
    model_options: ModelOptions,
    scheduling: SchedulingOptions,
    server: ServerOptions,
    limits: LimitOptions,
    cluster: ClusterOptions,
) -> None:
    """Serve MODEL over HTTP: OpenAI's /v1/chat/completions, with deadline_ms and min_accuracy in addition."""
    try:
        from skipkernels.server.http.samples import read_chats
        from skipkernels.server.http.server import listen
        from skipkernels.server.http.server import serve as serve_http
        from skipkernels.server.http.service import Service
    except ImportError as error:
        raise SkipkernelsError(f"serving needs more packages ({error}): pip install skipkernels[serve]") from error
    from skipkernels.modality.policies import get_selection_policy

    get_selection_policy(scheduling.selection)  # a wrong name is refused before a model is loaded
    require_folder(scheduling.profile)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    chats = None if scheduling.samples is None else read_chats(scheduling.samples, limits.limits())
    with listen(server.host, server.port) as listener:
        load = _loader(model_options, scheduling, cluster, chats)
        starting = _on_ray(load, scheduling, cluster, chats) if cluster.ray else _here(load, scheduling, chats)
        with starting as served:
            # the profile may come from a file, with another name
            profile = replace(served.profile, model=server.name_of(model_options))
            service = Service(profile, served.format, served.backend, limits=limits.limits(), **server.service_options)

            def on_started() -> None:
                _announce(profile, listener, server)
                served.started(service)

            def on_draining(requests: int) -> None:
                running = f"{count(requests, 'request')} {'is' if requests == 1 else 'are'} running"
                waited = f"for {server.grace_s:g} s at most; a second signal ends them at once"
                err.print(f"draining: {running}, {waited}", soft_wrap=True)

            serve_http(service, listener, grace_s=server.grace_s, on_started=on_started, on_draining=on_draining)
    err.print("stopped")


def _loader(
    model_options: ModelOptions, scheduling: SchedulingOptions, cluster: ClusterOptions, chats: Chats
) -> ChatModelLoader:
    from skipkernels.chat.loading import ChatModelLoader
    from skipkernels.chat.text_model import exact_match, shared_prefix

    path = model_options.path
    if (folder := Path(path)).is_dir():
        path = str(folder.resolve())  # absolute: other processes may have another working directory
    beside = Path(path) / POLICY_FILE
    policy_files = scheduling.policy or ([beside] if beside.exists() else [])
    threads = model_options.threads
    options: dict[str, Any] = {
        "device": model_options.device,
        "dtype": model_options.dtype,
        "max_seq_len": model_options.max_seq_len,
        "max_batch_size": scheduling.max_batch_size,
        "executor": model_options.executor,
        "num_threads": (threads or 1) if cluster.ray else threads,  # replicas share the processors
        "kernels": model_options.kernels,
        "conditional": model_options.conditional,
        "loop": model_options.loop,
    }
    return ChatModelLoader(
        name=model_options.model,
        path=path,
        skip_levels=scheduling.levels,
        # a name that is no file may be one of the policies that come with the package
        policy_files=tuple(str(file.resolve() if file.exists() else file) for file in policy_files),
        metric=exact_match if chats and chats[0].expected is not None else shared_prefix,
        options=options,
        measures=not cluster.ray,
    )


def _find_levels(model: TextModel, scheduling: SchedulingOptions, chats: Chats) -> None:
    """The levels that were measured before; or, where a profile of them is wanted before anybody is served, now."""
    from skipkernels.chat.neuron_levels import kept_policies

    kept = kept_policies(model.engine, model.open_levels) if scheduling.text is None else None
    if kept is not None:
        model.offer(kept)
    elif scheduling.profile is not None or chats is not None:
        with stage("finding the neurons to leave out ..."):
            measure_levels(model, _texts(scheduling.text))


@contextmanager
def _here(load: ChatModelLoader, scheduling: SchedulingOptions, chats: Chats) -> Iterator[Served]:
    """The model in this process, beside the server."""
    from skipkernels.chat.engine_worker import EngineModel, EngineWorker
    from skipkernels.chat.text_model import TextModel
    from skipkernels.modality.profile_file import load_profile
    from skipkernels.modality.runtime import Runtime
    from skipkernels.server.http.backend import Embedded

    with stage(f"loading {load.name} ..."):
        model = load()
    if isinstance(model, TextModel) and model.open_levels:
        _find_levels(model, scheduling, chats)

    def run(measure: Measure) -> Profile:
        with progress_bar("profiling") as report:
            return measure(model, progress=report)

    profiling: IdleProfiling | None = None
    if isinstance(model, TextModel) and scheduling.profile is None and chats is None:
        if (kept := kept_profile(model)).exists() and scheduling.text is None:
            profile = load_profile(kept, model=model)
        else:
            with stage("timing the dense model ..."):
                profile = first_profile(model, scheduling.max_batch_size)
            profiling = IdleProfiling(model, profile, partial(_texts, scheduling.text))
    else:
        profile = _profile(model, scheduling, chats, run, slots=True)
    worker = EngineWorker(cast("EngineModel", model))
    runtime = Runtime(profile, [worker], scheduling.selection, **scheduling.runtime_options)
    served = Served(profile, model.format, Embedded(runtime, cast("EngineModel", model).engine.loop.cache_status))
    if profiling is None:
        yield served
        return
    try:
        yield replace(served, started=profiling.start)
    finally:
        profiling.stop()


@contextmanager
def _on_ray(
    load: ChatModelLoader, scheduling: SchedulingOptions, options: ClusterOptions, chats: Chats
) -> Iterator[Served]:
    """The model in processes of its own."""
    from skipkernels.server.ray.cluster import Resources, ray_cluster

    reserved = Resources(cpus=load.options["num_threads"], gpus=float(load.options["device"].startswith("cuda")))
    with ray_cluster(options.ray_address) as cluster:
        with stage(f"loading {load.name} on Ray ..."):
            replicas = cluster.start_replicas(load, options.replicas, reserved)
            description = cluster.describe(replicas[0])

        def run(measure: Measure) -> Profile:
            with stage("profiling ..."):
                return cluster.profile(replicas[0], measure)

        profile = _profile(cast("ChatModel", description), scheduling, chats, run, slots=False)
        with stage("starting the scheduler ..."):
            backend = cluster.start_scheduler(
                profile, replicas, selection=scheduling.selection, **scheduling.runtime_options
            )
        yield Served(profile, description.format, backend)


def _profile(
    model: ChatModel, scheduling: SchedulingOptions, chats: Chats, run: Callable[[Measure], Profile], *, slots: bool
) -> Profile:
    """Reads the profile from the file, or measures it with ``run``.

    Args:
        slots: whether it is served here, in slots, and a killed measurement can be resumed; on Ray it runs batches.
    """
    from skipkernels.chat import chat_profile
    from skipkernels.modality.profile_file import load_profile, save_profile
    from skipkernels.server.http.samples import samples_of

    path = scheduling.profile
    if path is not None and path.exists():
        return load_profile(path, model=model)
    options: dict[str, Any] = {
        "effort": chat_profile.QUICK if path is None else chat_profile.THOROUGH,
        "max_batch_size": scheduling.max_batch_size,
        "slots": slots,
        "journal": path.with_suffix(".journal") if path is not None and slots else None,
    }
    if chats is not None:
        profile = run(partial(chat_profile.profile_of_samples, samples=samples_of(chats, model.format), **options))
    elif tuple(model.modalities) == ("text",):
        profile = run(partial(chat_profile.profile_of_texts, texts=_texts(scheduling.text), **options))
    else:
        raise SkipkernelsError(
            f"{model.name} takes {', '.join(model.modalities)}: give --samples FILE with chats to profile on, or "
            "--profile FILE with a profile that was measured"
        )
    if path is not None:
        save_profile(path, profile)
        err.print(f"[dim]wrote {path}[/]")
    return profile


def _texts(file: Path | None, pause: Callable[[], None] = lambda: None) -> list[str]:
    """What to profile on. ``pause`` is called often while it is collected."""
    if file is not None:
        return [read_text(file)]
    from skipkernels.cli.builtin_text import documentation

    return ["\n\n".join(documentation(pause))]


def _announce(profile: Profile, listener: socket.socket, server: ServerOptions) -> None:
    err.print(profile.source)
    rows = table("strategy", "promised accuracy", "ms")
    for entry in profile.strategies:
        rows.add_row(entry.strategy.name, f"{entry.promised_accuracy:.3f}", f"{entry.median_ms(1):.1f}")
    err.print(rows)
    for line in needless(profile):
        err.print(line, soft_wrap=True)
    host, port = listener.getsockname()[:2]
    if server.open_to_others:
        err.print(f"[yellow]everybody who can reach {host} can use this server: there is no --api-key[/]")
    shown = f"[{host}]" if ":" in host else host
    err.print(f"serving {profile.model} at http://{shown}:{port}/v1, Ctrl-C stops it", soft_wrap=True, markup=False)
