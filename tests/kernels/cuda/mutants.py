"""Plants bugs in the text of the kernels, and sees whether their checks fail.

``python -m tests.kernels.cuda.mutants [NAME ...]`` plants those whose names have one of
the words, and prints what became of each. The modules that a bug changes, and all that
lead from them to the checks, are imported anew; the others stay, and so does what has
been compiled of them.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.abc import MetaPathFinder
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

from numba.core.errors import NumbaError

KERNELS = "hps_numba.kernels.cuda"
CHECKS = "tests.kernels.cuda.mutant_checks"
_ROOT = Path(__file__).parents[3]
_FOLDERS = (KERNELS, "tests.kernels.cuda")
N_PROCESSES = 2
# What says that a bug was not planted well.
_UNFIT = (NumbaError, NotImplementedError, ImportError, SyntaxError, NameError)


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Parameters
    ----------
    name
        What is wrong.
    module
        Name of the module within the package of kernels.
    old, new
        Text that is there once, and what takes its place.
    check
        Function of ``mutant_checks`` that fails because of it.
    also
        Other texts that are there once, and what takes their places.
    """

    name: str
    module: str
    old: str
    new: str
    check: str
    also: tuple[tuple[str, str], ...] = ()

    @property
    def full_module(self) -> str:
        return f"{KERNELS}.{self.module}"


@dataclass(frozen=True)
class Verdict:
    """What a check said of a mutant; ``error`` is empty where it passed."""

    mutant: str
    error: str
    elapsed_s: float


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, mutant: Mutant, path: str) -> None:
        super().__init__(mutant.full_module, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> Any:
        return compile(mutated(self._mutant), self.path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.full_module:
            return None
        loader = _Loader(self._mutant, str(_path_of(fullname)))
        return importlib.util.spec_from_file_location(
            fullname, loader.path, loader=loader
        )


def mutated(mutant: Mutant) -> str:
    """Return a module's text with the bug.

    Raises
    ------
    ValueError
        If the old text is not there once.
    SyntaxError
        If the new text does not fit.
    """
    text = _path_of(mutant.full_module).read_text()
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        if text.count(old) != 1:
            raise ValueError(
                f"{mutant.name}: text found {text.count(old)} times in "
                f"{mutant.full_module}"
            )
        text = text.replace(old, new)
    compile(text, mutant.name, "exec")
    return text


def _path_of(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py")


@cache
def _imports() -> dict[str, set[str]]:
    """Return which modules each module of kernels and their tests imports."""
    found = {}
    for folder in _FOLDERS:
        for path in _ROOT.joinpath(*folder.split(".")).glob("*.py"):
            if not path.stem.startswith(("test_", "__")):
                tree = ast.parse(path.read_text())
                found[f"{folder}.{path.stem}"] = set(_imported(tree))
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)


@cache
def users_of(module: str) -> frozenset[str]:
    """Return a module and all that use it, by whatever way."""
    found = {module}
    while True:
        more = {one for one, names in _imports().items() if names & found} - found
        if not more:
            return frozenset(found)
        found |= more


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Let the bug be in what is imported from now on; in the end it is gone again."""
    names = users_of(mutant.full_module)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    _forget(names)
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(names)
        for name, module in before.items():
            sys.modules[name] = module
            setattr(*_place_of(name), module)


def _forget(names: Iterable[str]) -> None:
    for name in names:
        if sys.modules.pop(name, None):
            # A package's attribute would be found before the module is looked for.
            delattr(*_place_of(name))


def _place_of(name: str) -> tuple[ModuleType, str]:
    parent, _, last = name.rpartition(".")
    return sys.modules[parent], last


def run_check(name: str) -> str:
    """Run one check with the modules as they are now; return how it failed, or nothing.

    A kernel that does not compile is no catch, and raises.
    """
    check = getattr(importlib.import_module(CHECKS), name)
    try:
        check()
    except _UNFIT:
        raise
    except Exception as error:  # whatever a test trips over
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def judge(mutant: Mutant) -> Verdict:
    """Plant one bug and run its check."""
    started = perf_counter()
    with planted(mutant):
        error = run_check(mutant.check)
    return Verdict(mutant.name, error, perf_counter() - started)


def judge_all(mutants: Sequence[Mutant]) -> list[Verdict]:
    """Judge mutants in fresh processes; each compiles what is unchanged once."""
    for one in mutants:
        mutated(one)  # or fail before the rest has run
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(N_PROCESSES, mp_context=context) as pool:
        return list(pool.map(judge, mutants))


def all_mutants() -> list[Mutant]:
    """Return the bugs to plant."""
    from tests.kernels.cuda.race_mutants import RACE_MUTANTS
    from tests.kernels.cuda.result_mutants import RESULT_MUTANTS
    from tests.kernels.cuda.static_mutants import STATIC_MUTANTS

    return [*RACE_MUTANTS, *RESULT_MUTANTS, *STATIC_MUTANTS]


def main(words: Iterable[str]) -> int:
    """Print what became of the mutants; return how many survived."""
    wanted = list(words) or [""]
    chosen = [one for one in all_mutants() if any(word in one.name for word in wanted)]
    verdicts = judge_all(chosen)
    for one in sorted(verdicts, key=lambda one: bool(one.error)):
        print(f"{one.elapsed_s:6.1f} s  {one.mutant}: {one.error or 'SURVIVED'}")  # noqa: T201 (a command)
    return sum(not one.error for one in verdicts)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
