"""How ranks on other machines would reach this one."""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hmoe_ds.doctor.finding import Finding, note, ok, problem

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "MASTER_")
# InfiniBand registers memory, which this limit would forbid.
_LOCKED_BYTES = 2**30


@dataclass(frozen=True)
class Interface:
    """A network interface that is up, and its addresses of IPv4 and IPv6."""

    name: str
    addresses: tuple[str, ...]


def check_network(environment: Mapping[str, str], gpus: bool, which: Callable[[str], str | None]) -> Iterator[Finding]:
    """All of it, of this machine; `gpus`: whether NCCL would be used."""
    interfaces, name = read_interfaces(), socket.gethostname()
    way = find_way(interfaces, own_address())
    yield check_interfaces(interfaces, way)
    yield check_host_name(name, resolve(name), way, environment.get(GLOO))
    yield from check_variables(environment, [interface.name for interface in interfaces], gpus)
    yield from check_infiniband(Path("/sys/class/infiniband"), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield check_launchers(which)


def read_interfaces() -> list[Interface]:
    """Those of this machine that are up and have an address."""
    up = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        Interface(name, addresses)
        for name, entries in psutil.net_if_addrs().items()
        if up[name].isup and (addresses := tuple(entry.address for entry in entries if entry.family in families))
    ]


def own_address() -> str | None:
    """The address from which this machine would speak to a distant one; None without a route. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation, which no machine has
        except OSError:
            return None
        return probe.getsockname()[0]


def resolve(name: str) -> list[str]:
    """Addresses of a host name; none where it does not resolve."""
    with contextlib.suppress(socket.gaierror):
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    return []


def find_way(interfaces: Sequence[Interface], address: str | None) -> Interface | None:
    """The interface towards other machines: that of `address`, else the first which is not the loopback."""
    outer = [interface for interface in interfaces if not all(_is_loopback(text) for text in interface.addresses)]
    return next((interface for interface in outer if address in interface.addresses), next(iter(outer), None))


def check_interfaces(interfaces: Sequence[Interface], way: Interface | None) -> Finding:
    """The interfaces, and the one that other machines would reach."""
    if way is None:
        return note(
            "network",
            "no interface but the loopback is up: one machine only",
            "",
            "docker run --network host, if in one",
        )
    others = [f"{interface.name} {interface.addresses[0]}" for interface in interfaces if interface != way]
    more = f"; also up: {', '.join(others)}" if others else ""
    return ok("network", f"other machines are reached by {way.name}, {way.addresses[0]}{more}")


def check_host_name(name: str, addresses: Sequence[str], way: Interface | None, chosen: str | None) -> Finding:
    """Whether the host name leads to an address that others reach: gloo listens there, unless told otherwise.

    Args:
        name: of this host.
        addresses: to which it resolves.
        way: the interface towards other machines.
        chosen: the interface that GLOO_SOCKET_IFNAME names.
    """
    outer = [address for address in addresses if not _is_loopback(address)]
    to = ", ".join(addresses) or "no address"
    if chosen is not None:
        return ok("host name", f"{name} resolves to {to}; gloo listens on {chosen}, as {GLOO} says")
    if outer:
        return ok("host name", f"{name} resolves to {to}")
    mend = "give it the machine's address in /etc/hosts (127.0.1.1 there is Debian's habit)"
    if way is not None:
        mend = f"where hmoe does not start the ranks itself, export {GLOO}={way.name}; or {mend}"
    found = f"{name} resolves to {to}: gloo listens on the loopback, where no other machine reaches it"
    return note("host name", found, "", mend)


def check_variables(environment: Mapping[str, str], interfaces: Sequence[str], gpus: bool) -> Iterator[Finding]:
    """The variables of the communication libraries, and those that name an interface that is not there.

    Args:
        environment: of this process.
        interfaces: names of those that are up.
        gpus: whether NCCL would be used.
    """
    there = ", ".join(interfaces)
    for name in environment.get(GLOO, "").split(","):
        if name and name not in interfaces:
            yield problem(GLOO, f"{name}, which is not up", f"one of {there}", f"export {GLOO} anew, or unset it")
    if environment.get(NCCL) and not _nccl_choice(environment[NCCL], interfaces):
        make = problem if gpus else note
        yield make(
            NCCL, f"{environment[NCCL]} leaves no interface", f"some of {there}", f"export {NCCL} anew, or unset it"
        )
    values = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith(_PREFIXES)]
    if values:
        yield ok("variables", ", ".join(values))


def _nccl_choice(value: str, interfaces: Sequence[str]) -> list[str]:
    """The interfaces that NCCL takes: those with one of these prefixes, or (=) names, or (^) all others."""
    exclude, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    parts = [part for part in value.lstrip("^=").split(",") if part]

    def matches(name: str) -> bool:
        return any(name == part if exact else name.startswith(part) for part in parts)

    return [name for name in interfaces if matches(name) != exclude]


def check_infiniband(folder: Path, locked: int) -> Iterator[Finding]:
    """InfiniBand devices whose ports are listed below `folder`; `locked`: limit of locked memory in bytes, -1: none."""
    states = {
        f"{port.parts[-4]}:{port.parts[-2]}": port.read_text().partition(": ")[2].strip()
        for port in sorted(folder.glob("*/ports/*/state"))
    }
    if not states:
        return
    listed = ", ".join(f"{name} {state}" for name, state in states.items())
    if "ACTIVE" not in states.values():
        yield note("InfiniBand", listed, "a port that is ACTIVE", "check cable and subnet manager (ibstat)")
    else:
        yield ok("InfiniBand", listed)
    if 0 <= locked < _LOCKED_BYTES:
        found = f"at most {locked // 1024} KiB may be locked in memory, which RDMA does"
        yield note("InfiniBand", found, "no limit", "ulimit -l unlimited; docker run --ulimit memlock=-1")


def check_launchers(which: Callable[[str], str | None]) -> Finding:
    """Programs that start ranks on other machines; `which`: path of a program, or None."""
    there = [name for name in ("ssh", "pdsh", "srun", "mpirun") if which(name)]
    if {"ssh", "pdsh"} <= {*there} or {"srun", "mpirun"} & {*there}:
        return ok("launchers", ", ".join(there))
    found = f"{', '.join(there) or 'none of ssh, pdsh, srun, mpirun'}: one machine only"
    return note("launchers", found, "", "`deepspeed --hostfile` needs ssh and pdsh on the machine where it is started")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
