"""Keeps Ray on this machine.

By default Ray listens on all interfaces, and unpickles whatever it receives there. The settings below are not part of
Ray's public interface, so a test checks every open port.
"""

from __future__ import annotations

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes Ray's own servers listen on loopback, on Linux too
}


def on_loopback(kind: type[object]) -> type[object]:
    """A subclass of ``kind`` whose deployments listen on loopback only: Serve opens a port for each deployment after it
    created the object."""

    class OnLoopback(kind):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: object) -> None:
            from ray.serve._private import replica

            listen = replica.add_port_to_grpc_server
            replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", LOOPBACK))
            super().__init__(*arguments)

    return OnLoopback
