"""The examples run as they are, and print what they promise."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.fakegpu import shim
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_servers import RedisServer

EXAMPLES = Path(__file__).parents[2] / "examples"

EXPECTED = {
    "quickstart.py": [
        "shape: (2, 2, 16)",
        "found: [[True, True], [True, False]]",
        "as trained: True",
        "updated: [1. 1. 1.]",
        "after a restart: [1. 1. 1.]",
    ],
    "python_config.py": [
        "flat keys: (2048, 16) float32",
        "shaped keys: (1024, 2, 32)",
        "both tables: {'sparse_embedding1': (1024, 2, 16), "
        "'sparse_embedding2': (1024, 2, 32)}",
        "same rows: True",
    ],
    "many_threads.py": [
        "wrong rows: 0",
        "every reader read: True",
        "updated rows: 40000",
    ],
    "migrate_from_hps.py": ["OUTPUT0: (4180,)", "right rows: True"],
}

OVER_REDIS = [
    "same rows: True",
    "updated by the first: [1. 1. 1.]",
    "it came from: ['redis']",
]

OVER_KAFKA = [
    "as deployed: True",
    "caught up: True",
    "as trained: True",
    "changed rows: 4364",
]

ON_A_DEVICE = [
    "on the host: (2, 4, 8) True",
    "found: [[True, True, True, True], [True, True, True, False]]",
    "on the device: True",
    "updated: [1. 1. 1.]",
    "some were missing: True",
    "prepared: True",
    "missing now: 0",
]

# By the library that they need, and its distribution.
WITH_A_LIBRARY = {
    "gpu_torch.py": ("torch", "PyTorch"),
    "gpu_cupy.py": ("cupy", "CuPy"),
}
WITH_A_LIBRARY_EXPECTED = {
    "gpu_torch.py": [
        "into a tensor: True",
        "from an array: True",
        "on a stream: True",
        "from a graph: True",
        "same scores: True",
    ],
    "gpu_cupy.py": [
        "users: cupy (512, 16) True",
        "items: cupy (512, 10, 16) True",
        "scores: (512, 10)",
        "on a stream: cupy (512, 16) True",
        "from a graph: cupy (512, 16) True",
    ],
}


@pytest.fixture
def lines_missing(tmp_path, monkeypatch, capsys):
    """Return what runs an example, and tells which promised lines it did not print."""

    def run(name: str, promised: list[str]) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out.splitlines()
        return [line for line in promised if line not in printed]

    return run


def test_every_example_is_run():
    over_services = ["shared_redis.py", "publish_updates.py"]
    run = [*EXPECTED, *over_services, "gpu_cache.py", *WITH_A_LIBRARY]
    assert sorted(run) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_prints_what_it_promises(name, lines_missing):
    assert lines_missing(name, EXPECTED[name]) == []


@pytest.mark.service
def test_the_example_of_a_shared_redis_prints_what_it_promises(
    lines_missing, monkeypatch
):
    with RedisServer() as server:
        monkeypatch.setenv("REDIS_ADDRESS", server.address)
        assert lines_missing("shared_redis.py", OVER_REDIS) == []
        with server.client() as client:
            assert client.keys("*") == []


@pytest.mark.service
def test_the_example_of_published_updates_prints_what_it_promises(
    lines_missing, monkeypatch
):
    with KafkaBroker() as broker:
        monkeypatch.setenv("KAFKA_BROKERS", broker.bootstrap)
        assert lines_missing("publish_updates.py", OVER_KAFKA) == []


@pytest.mark.device
def test_the_example_of_the_gpu_cache_prints_what_it_promises(lines_missing):
    assert lines_missing("gpu_cache.py", ON_A_DEVICE) == []


@pytest.mark.parametrize("name", sorted(WITH_A_LIBRARY))
def test_an_example_without_its_library_says_so(name, lines_missing, monkeypatch):
    module, title = WITH_A_LIBRARY[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"this example needs {title}: pip install"):
        lines_missing(name, [])


if shim.real_driver():  # neither library works over the stand-in

    @pytest.mark.device
    @pytest.mark.parametrize(
        "name",
        [n for n, (module, _) in WITH_A_LIBRARY.items() if find_spec(module)],
    )
    def test_an_example_works_with_its_library(name, lines_missing):
        assert lines_missing(name, WITH_A_LIBRARY_EXPECTED[name]) == []
