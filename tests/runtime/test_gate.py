from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from hps_numba.errors import ClosedError, UnknownTableError
from hps_numba.runtime.gate import Gate


def make() -> Gate:
    return Gate("test", lambda: ClosedError("it is closed"))


def test_callers_pass_and_may_nest() -> None:
    gate = make()
    with gate, gate:
        pass
    with gate:
        pass


def test_nobody_enters_a_closed_gate() -> None:
    gate = make()
    gate.close()
    gate.close()
    with pytest.raises(ClosedError, match="it is closed"), gate:
        pytest.fail("went through")


def test_closing_may_change_the_refusal() -> None:
    gate = make()
    gate.close(lambda: UnknownTableError("it was removed"))
    with pytest.raises(UnknownTableError, match="it was removed"), gate:
        pass


def test_closing_waits_for_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, inside, leave = make(), threading.Event(), threading.Event()
    closing, wait_for = threading.Event(), gate._changed.wait_for
    order: list[str] = []

    def noticed(*args: Any) -> bool:
        closing.set()
        return wait_for(*args)

    monkeypatch.setattr(gate._changed, "wait_for", noticed)

    def visit() -> None:
        with gate:
            inside.set()
            assert leave.wait(30)
            order.append("left")

    def close() -> None:
        gate.close()
        order.append("closed")

    visitor, closer = threading.Thread(target=visit), threading.Thread(target=close)
    visitor.start()
    assert inside.wait(30)
    closer.start()
    assert closing.wait(30)
    with pytest.raises(ClosedError), gate:
        pass
    assert order == []
    leave.set()
    visitor.join()
    closer.join()
    assert order == ["left", "closed"]


def test_a_caller_that_raises_leaves() -> None:
    gate = make()
    with pytest.raises(ZeroDivisionError), gate:
        raise ZeroDivisionError
    gate.close()  # does not wait


def test_a_forked_process_is_refused() -> None:
    gate = make()
    parent, child = os.pipe()
    process = os.fork()
    if process == 0:  # the child says what it saw and goes, without any clean-up
        try:
            with gate:
                os.write(child, b"inside")
        except ClosedError as exc:
            os.write(child, str(exc).encode())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert f"belongs to process {os.getpid()}" in os.read(parent, 1000).decode()
    with gate:
        pass
