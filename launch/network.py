"""Addresses and interfaces of this machine, as other machines see them."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import psutil
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
NOBODYS = "192.0.2.1"
"""An address kept for documentation: asking for the way there sends nothing."""

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def open_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Keep a store in this process. Torch's own would listen on every interface, at a port guessed to be free.

    Args:
        address: Where to listen; empty for every interface.
        port: 0 lets the kernel choose.
        timeout: How long a call may wait for a key.

    Raises:
        OSError: Where the port is taken or the address is not here.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
        port = listener.getsockname()[1]
        descriptor = listener.detach()  # the store closes it
    own_end = address or LOOPBACK
    return TCPStore(own_end, port, None, True, timeout, wait_for_workers=False, master_listen_fd=descriptor)


def choose_interface(towards: str) -> None:
    """Tell gloo and NCCL the interface that leads to a host, unless the user has told them one."""
    missing = [variable for variable in INTERFACE_VARIABLES if variable not in os.environ]
    route = route_to(towards) if missing else None
    if route is not None:
        os.environ.update(dict.fromkeys(missing, route[1]))


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port"; the port is 0 where there is none. An IPv6 address stands in brackets."""
    host, _, port = endpoint.rpartition(":") if not endpoint.endswith("]") else (endpoint, "", "")
    if not host:
        host, port = endpoint, ""
    return host.strip("[]"), int(port or 0)


def route_to(endpoint: str) -> tuple[str, str] | None:
    """This machine's address and interface for reaching another one.

    Where the other one is this machine itself, which often knows its own name by a loopback address, it is the
    address by which others reach it. Only a loopback address given in numbers means loopback.

    Args:
        endpoint: "host" or "host:port".

    Returns:
        `(address, interface)`, or None where the host cannot be resolved or no interface has the address.
    """
    host, port = split_endpoint(endpoint)
    address = _address_towards(host, port)
    if address is not None and _is_loopback(address) and not _is_loopback(host):
        address = _address_towards(NOBODYS, 9) or _only_address() or address
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(address), interface
    return None


def is_here(host: str) -> bool:
    """Whether a host name or address is this machine's."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    here = {entry.address for addresses in psutil.net_if_addrs().values() for entry in addresses}
    return bool(found & here) or any(_is_loopback(address) for address in found)


def _address_towards(host: str, port: int) -> str | None:
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _only_address() -> str | None:
    """The address of the one interface that is up and not the loopback one; None where there are several."""
    states = psutil.net_if_stats()
    found = [
        entry.address
        for interface, addresses in psutil.net_if_addrs().items()
        if states[interface].isup
        for entry in addresses
        if entry.family == socket.AF_INET and not _is_loopback(entry.address)
    ]
    return found[0] if len(found) == 1 else None
