"""What the processes below this one do, as Linux tells it."""

import os
from collections import defaultdict
from ipaddress import IPv6Address, ip_address
from pathlib import Path

_LISTENING, _ESTABLISHED = "0A", "01"


def below() -> dict[int, str]:
    """Processes that this one has started, and those that they have: number and command line."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        except OSError:  # it has just ended
            continue
    found, waiting = {}, list(children[os.getpid()])
    while waiting:
        process = waiting.pop()
        waiting += children[process]
        found[process] = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    return found


def replicas_of(name: str) -> list[int]:
    """Processes of the Serve application whose name ends so."""
    return [process for process, command in below().items() if f"-{name}:" in command]


def addresses(processes: set[int]) -> list[str]:
    """Where their sockets listen, and with whom they are connected."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                sockets.add(str(descriptor.readlink()))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, own, other, state, *rest = line.split()
            if f"socket:[{rest[5]}]" in sockets and state in (_LISTENING, _ESTABLISHED):
                found.append(_address(own if state == _LISTENING else other))
    return found


def _address(written: str) -> str:
    """Linux writes words of four bytes, each in the machine's order."""
    host = written.partition(":")[0]
    words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
    address = ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)
