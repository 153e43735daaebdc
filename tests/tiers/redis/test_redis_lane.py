"""Whom a lane takes for silent: who sent nothing, not who had to wait for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from hps_numba.tiers.redis import lane as lanes
from hps_numba.tiers.redis.lane import Lane

TIMEOUT_S = 2.0


@dataclass
class Clock:
    """Time that goes by only while a reply is worked on."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Conversation:
    """A channel whose reply takes ``work_s`` to read."""

    name: str
    clock: Clock
    work_s: float
    ours: socket.socket
    theirs: socket.socket
    read: bytes = b""
    gave_up: list[Exception] = field(default_factory=list)
    wants_to_send: bool = False
    unsent: int = 0  # times that send() leaves something over

    @property
    def has_to_send(self) -> bool:
        return self.unsent > 0

    @property
    def node(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.name)

    @property
    def fileno(self) -> int:
        return self.ours.fileno()

    def send(self) -> None:
        self.unsent = max(self.unsent - 1, 0)

    def receive(self) -> bool:
        self.read += self.ours.recv(64)
        self.clock.now_s += self.work_s
        return True

    def give_up(self, error: Exception) -> None:
        self.gave_up.append(error)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lanes, "monotonic", clock)
    return clock


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(2)]
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


def converse(*channels: Conversation, asked: Callable[[], None] | None = None) -> None:
    Lane(TIMEOUT_S)._converse({channel.fileno: channel for channel in channels}, asked)


def test_an_answer_that_waits_for_this_thread_is_not_late(
    clock: Clock, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    first, second = (
        Conversation(name, clock, work_s, *pair)
        for name, work_s, pair in zip("ab", (10 * TIMEOUT_S, 0.0), pairs, strict=True)
    )

    # The second answer arrives while the first one is worked on, for too long.
    def receive_and_answer() -> bool:
        second.theirs.send(b"second")
        return Conversation.receive(first)

    first.receive = receive_and_answer  # type: ignore[method-assign]
    first.theirs.send(b"first")
    converse(first, second)
    assert (first.read, second.read) == (b"first", b"second")
    assert not first.gave_up
    assert not second.gave_up


def test_a_server_that_sends_nothing_is_late(
    clock: Clock, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    first, second = (
        Conversation(name, clock, work_s, *pair)
        for name, work_s, pair in zip("ab", (10 * TIMEOUT_S, 0.0), pairs, strict=True)
    )
    first.theirs.send(b"first")
    converse(first, second)
    assert first.read == b"first"
    assert [str(error) for error in second.gave_up] == ["no answer in 2 s"]


def test_the_next_one_is_let_in_once_all_servers_have_all_commands(
    clock: Clock, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    first, second = (
        Conversation(name, clock, 0.0, *pair, unsent=unsent)
        for name, unsent, pair in zip("ab", (1, 2), pairs, strict=True)
    )
    events = []

    def let_in() -> None:
        events.append((first.unsent, second.unsent))
        second.theirs.send(b"second")

    # The first server answers a part; only then the second one takes the rest.
    def receive_a_part() -> bool:
        events.append("a part")
        first.read += first.ours.recv(64)
        second.send()
        first.receive = Conversation.receive.__get__(first)  # type: ignore[method-assign]
        first.theirs.send(b" rest")
        return False

    first.receive = receive_a_part  # type: ignore[method-assign]
    first.theirs.send(b"first")
    converse(first, second, asked=let_in)
    assert events == ["a part", (0, 0)]
    assert (first.read, second.read) == (b"first rest", b"second")
