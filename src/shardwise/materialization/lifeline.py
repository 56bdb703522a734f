"""Whether the ranks next to this one still live: a connection that closes without a farewell is that of a process that has ended.

The ranks of a call stand in a ring, and each keeps a connection to the next one. Of a process that is killed the system closes it;
one that is stopped, or busy, keeps it. From another machine nothing else tells the two apart. Nothing is sent but a greeting and a
farewell, so that a rank that leaves the call is not taken for one that has died.

Where ranks cannot connect (their store is a file, or a firewall is between them) nobody is told, and a rank that has died is one that
does not arrive.
"""

from __future__ import annotations

import errno
import functools
import json
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress

from shardwise.materialization.call_store import CallStore

_TOKEN_BYTES = 16
_GREETING, _FAREWELL = b"+", b"-"
_MOST_STRANGERS = 8
_NOT_YET = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS, errno.ENOTCONN, errno.EALREADY})
# A machine that is down closes nothing: a minute after its last answer its ranks count as ended.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9}


class Lifeline:
    """This rank's two connections in the ring; used by one thread.

    Args:
        ranks: Global ranks of the call, in one order on all of them.
        rank: This one.
        store: Of the call; here each rank says where it listens.
        prefix: Of the call's keys.
    """

    def __init__(self, ranks: Sequence[int], *, rank: int, store: CallStore, prefix: str) -> None:
        self._ranks = ranks
        at = ranks.index(rank)
        self._previous, self._next = ranks[at - 1], ranks[(at + 1) % len(ranks)]
        self._store = store
        self._prefix = f"{prefix}/listens"
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._to_next: _Line | None = None
        self._from_previous: _Line | None = None
        self._strangers: list[_Line] = []
        self._listener: socket.socket | None = None
        towards = store.host_address if len(ranks) > 1 else None
        own = _own_address(*towards) if towards is not None else None
        if own is not None:
            with suppress(OSError):
                self._listener = _listening(own)
        place = self._listener.getsockname()[:2] if self._listener is not None else None
        if len(ranks) > 1:
            text = json.dumps([socket.gethostname(), place, self._token.hex()])
            store.set(f"{self._prefix}/{rank}", text)

    def connect(self) -> None:
        """Begin to connect to the next rank. Every rank has made its own object by now."""
        if len(self._ranks) == 1:
            return
        _, place, token = self._said_by(self._next)
        if place is None:
            return
        with suppress(OSError):
            connection = _unblocking(socket.socket(_family(place[0]), socket.SOCK_STREAM))
            connection.connect_ex(tuple(place))
            self._to_next = _Line(connection, says=bytes.fromhex(token), expects=_GREETING)

    def look(self) -> None:
        """Accept, greet and be greeted, as far as that goes without waiting."""
        self._accept()
        for line in (self._from_previous, self._to_next):
            if line is not None:
                line.look()

    def ended(self) -> str:
        """Return which neighbour's process has ended without a farewell, and on which host; empty while none has. Does not wait."""
        self.look()
        for rank, line in ((self._previous, self._from_previous), (self._next, self._to_next)):
            if line is not None and line.has_ended:
                return f"rank {rank} on {self._said_by(rank)[0]}"
        return ""

    def close(self) -> None:
        """Say farewell, and close everything."""
        for line in (self._to_next, self._from_previous, *self._strangers):
            if line is not None:
                line.leave()
        if self._listener is not None:
            self._listener.close()
        self._listener = self._to_next = self._from_previous = None
        self._strangers = []

    def _accept(self) -> None:
        """Find the previous rank among those who connect: it knows the token."""
        if self._listener is None or self._from_previous is not None:
            return  # it is known, or cannot come
        with suppress(OSError):
            while len(self._strangers) < _MOST_STRANGERS:
                connection, _ = self._listener.accept()
                self._strangers.append(_Line(_unblocking(connection), says=b"", expects=self._token))
        for line in self._strangers:
            line.look()
        self._from_previous = next((line for line in self._strangers if line.is_greeted), None)
        if self._from_previous is not None:
            self._from_previous.say(_GREETING)
            self._listener.close()
        kept = [each for each in self._strangers if not each.is_closed and self._from_previous is None]
        for line in self._strangers:
            if line is not self._from_previous and line not in kept:
                line.leave()
        self._strangers = kept

    def _said_by(self, rank: int) -> tuple[str, tuple[str, int] | None, str]:
        host, place, token = json.loads(self._store.get([f"{self._prefix}/{rank}"])[0])
        return host, place, token


class _Line:
    """One connection; its end counts only once the other side has greeted.

    Args:
        connection: That does not block, and need not be made yet.
        says: First bytes to send.
        expects: First bytes of the other side.
    """

    def __init__(self, connection: socket.socket, *, says: bytes, expects: bytes) -> None:
        self._connection = connection
        self._unsent = says
        self._expects = expects
        self._received = b""
        self.is_closed = False

    @property
    def is_greeted(self) -> bool:
        """Whether the other side has sent what it should."""
        return self._received.startswith(self._expects)

    @property
    def has_ended(self) -> bool:
        """Whether the other side is gone without a farewell, as far as this one has looked."""
        return self.is_closed and self._received == self._expects

    def say(self, text: bytes) -> None:
        """Send something, now or at the next look."""
        self._unsent += text
        self.look()

    def look(self) -> None:
        """Take what has arrived, then send what is to be sent: a failed send would hide a farewell that is there."""
        try:
            while not self.is_closed:
                got = self._connection.recv(64)
                self._received = (self._received + got)[: 2 * _TOKEN_BYTES]
                self.is_closed = not got
        except OSError as error:
            self.is_closed = error.errno not in _NOT_YET
        if self._unsent and not self.is_closed:
            with suppress(OSError):
                self._unsent = self._unsent[self._connection.send(self._unsent) :]

    def leave(self) -> None:
        """Say farewell and close. What has arrived is taken first: else the system would reset the connection."""
        self.say(_FAREWELL)
        self._connection.close()
        self.is_closed = True


@functools.cache
def _own_address(host: str, port: int) -> str | None:
    """Return the address by which this machine reaches another one; None where it does not."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            # The name of a machine may have addresses of a kind that is switched off here.
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of a datagram socket: nothing is sent
                own: str = probe.getsockname()[0]
                return own
    return None


def _listening(address: str) -> socket.socket:
    listener = _unblocking(socket.socket(_family(address), socket.SOCK_STREAM))
    listener.bind((address, 0))
    listener.listen(_MOST_STRANGERS)
    return listener


def _unblocking(connection: socket.socket) -> socket.socket:
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
