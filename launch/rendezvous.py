"""Where the ranks meet: on one machine at a store that only this machine can reach, else where elastic says."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from lightlite.launch import network
from lightlite.launch.network import LOOPBACK

LOOPBACK_BACKEND = "lightlite-loopback"
STORE_TIMEOUT = timedelta(minutes=5)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single machine.

    Elastic's own backends listen on every interface, and guess a free port. Here the socket is bound to the
    loopback interface first, to a port that the kernel chose, and handed to the store. Every attempt gets a
    store of its own, so nothing of a failed attempt is left in the next.

    Args:
        run_id: Name of the run.
        port: Port for the first attempt; 0 lets the kernel choose.
    """

    def __init__(self, run_id: str, port: int = 0) -> None:
        self._run_id = run_id
        self._port = port
        self._closed = False

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks are clients of the launcher's store and listen on nothing themselves."""
        return True

    def get_backend(self) -> str:
        """Name in elastic's registry."""
        return LOOPBACK_BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """A new store for the next attempt.

        Raises:
            RendezvousConnectionError: Where the port asked for is taken.
        """
        store = open_store(LOOPBACK, self._port, STORE_TIMEOUT)
        self._port = 0
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, store.port))

    def is_closed(self) -> bool:
        """Whether `set_closed` was called."""
        return self._closed

    def set_closed(self) -> None:
        """Mark the run as ended."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """No other machine ever joins."""
        return 0

    def get_run_id(self) -> str:
        """Name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing is left open that the process does not close."""
        self._closed = True
        return True


def open_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Keep a store in this process; see `network.open_store`.

    Raises:
        RendezvousConnectionError: Where the port is taken or the address is not here; caused by the OSError.
    """
    try:
        return network.open_store(address, port, timeout)
    except OSError as error:
        raise RendezvousConnectionError(f"port {port} of {address or 'this machine'} cannot be used") from error


def _create_loopback(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id, parameters.get_as_int("port", 0) or 0)


def register_loopback() -> None:
    """Make the backend known to elastic by its name; calling it again is harmless."""
    rendezvous_handler_registry.register(LOOPBACK_BACKEND, _create_loopback)
