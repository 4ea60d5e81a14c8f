"""An agent that leaves when it has lost its rendezvous, and not before it ever had it, nor while it has it."""

from __future__ import annotations

import socket
import threading

from fusiontrain.cli.agent import wait_until_lost


def listen(port: int = 0) -> socket.socket:
    server = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=take, args=(server,), daemon=True).start()
    return server


def take(server: socket.socket) -> None:
    """Accept whoever comes until the server is closed."""
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def close(server: socket.socket) -> None:
    server.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which would hold the port
    server.close()


def test_the_rendezvous_is_lost_once_it_was_there_and_stays_away() -> None:
    first = listen()
    port = first.getsockname()[1]
    close(first)
    waiting = threading.Thread(target=wait_until_lost, args=("127.0.0.1", port, 1.0, 0.05), daemon=True)
    waiting.start()
    waiting.join(2.0)
    assert waiting.is_alive(), "nobody was there yet: torchrun's own limit holds"
    second = listen(port)
    waiting.join(2.0)
    assert waiting.is_alive(), "it is there"
    close(second)
    waiting.join(30)
    assert not waiting.is_alive()
