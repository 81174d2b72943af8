"""Requests that begin and end while their connections are looked at, in another thread."""

from __future__ import annotations

import gc
import time

from nbprod.serve.connections import Connections


def test_requests_end_while_connections_are_looked_at() -> None:
    """The garbage collector may run in the middle of a look, and let other threads go on."""
    connections = Connections()
    thousand = [("10.0.0.7", port) for port in range(1000)]
    thresholds = gc.get_threshold()

    class Ends:
        """Garbage that lets a request end when it is collected."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            connections.end(("10.0.0.8", len(connections._ended)))
            if gc.get_threshold() != thresholds:
                Ends()

    for peer in thousand:
        connections.end(peer)
    gc.set_threshold(10)
    try:
        Ends()
        for _ in range(10):
            [[peer] for peer in thousand]
            connections.look(time.monotonic() - 1)
        assert len(connections._ended) > len(thousand), "requests ended meanwhile"
        connections.look(time.monotonic() + 1000)
    finally:
        gc.set_threshold(*thresholds)
    assert not [peer for peer in connections._ended if peer in thousand], "those of the past are forgotten"
