"""Runs the server until a signal ends it. Needs the extra `serve`."""

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from catmaps.errors import UserError
from catmaps.server.app import create_app
from catmaps.server.service import Service

CONNECTIONS = 1024
"""Beyond as many, idle ones included, further ones get 503."""


class Server(uvicorn.Server):
    """Takes SIGINT and SIGTERM as the wish to end, and ends with status 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's would raise the signal anew once all is shut down."""
        if threading.current_thread() is not threading.main_thread():  # signals are not this server's
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        UserError: No such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); choose --host and --port") from error
    return listener


def make_server(service: Service) -> Server:
    """A server that is to be given a socket; before it ends it answers what has been asked for, within its time."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(service.limits.seconds)),
        timeout_keep_alive=5,
        server_header=False,
        ws="none",
    )
    return Server(config)


def serve(server: Server, listener: socket.socket, started: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        server: Of `make_server`.
        listener: Where.
        started: Called when it takes requests.
    """

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            started()
        await serving

    asyncio.run(run())
