"""The layout of the code base: the map is true, imports go one way along it, and the house rules that a machine can see.

The oracle of the order is the map in nanochat/__init__.py, read as text; the imports are read from the
syntax trees, so nothing is run.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("primer", "nanochat", "tasks", "scripts")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = python_files(*PACKAGES)
ALL = python_files(*PACKAGES, "tests", "dev")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_map() -> list[str]:
    """Module names in the order in which nanochat/__init__.py lists them: indented lines, first word."""
    docstring = ast.get_docstring(tree_of(ROOT / "nanochat/__init__.py")) or ""
    return re.findall(r"^    (\w+) {2,}\S", docstring, flags=re.MULTILINE)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def strings_of(path: Path) -> list[str]:
    """The string constants of a file that are not docstrings."""
    tree = tree_of(path)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def shell_scripts() -> list[Path]:
    return [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("dev/**/*.sh")), ROOT / ".ci/run"]


def test_the_map_lists_every_module_once() -> None:
    there = {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"}
    assert sorted(module_map()) == sorted(there)


def test_the_map_holds_no_code() -> None:
    assert len(tree_of(ROOT / "nanochat/__init__.py").body) == 1


@pytest.mark.parametrize("path", python_files("nanochat"), ids=lambda path: path.name)
def test_library_imports_only_from_above_on_the_map(path: Path) -> None:
    order = module_map()
    above = order[: order.index(path.stem)] if path.stem in order else []
    for name in imported_modules(path):
        if name.split(".")[0] == "primer" and path.name == "dataset.py":
            continue
        package, module = name.split(".")[:2]
        assert package == "nanochat", f"{path.name} imports {name}: nanochat comes first"
        assert module in above, f"{path.name} imports {name}, which is not above it on the map"


@pytest.mark.parametrize("path", python_files("primer"), ids=lambda path: path.name)
def test_the_primer_imports_nothing_else_of_ours(path: Path) -> None:
    assert not [name for name in imported_modules(path) if name.split(".")[0] != "primer"]


@pytest.mark.parametrize("path", python_files("tasks"), ids=lambda path: path.name)
def test_no_real_task_imports_the_primer(path: Path) -> None:
    toys = ("primer", "tasks.primer")
    if path.name not in ("primer.py", "mixtures.py"):
        assert not [name for name in imported_modules(path) if name.startswith(toys)]


@pytest.mark.parametrize("path", python_files("tasks", "scripts"), ids=lambda path: str(path.name))
def test_tasks_come_before_scripts_and_scripts_import_no_scripts(path: Path) -> None:
    if path.name == "plan.py":  # which adds up what the others do by default
        return
    assert not [name for name in imported_modules(path) if name.startswith("scripts")]


def test_only_the_tokenizer_spells_special_tokens() -> None:
    spellers = [path for path in LIBRARY if any("<|" in text for text in strings_of(path))]
    assert names(spellers) == ["nanochat/tokenizer.py"]


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_every_file_begins_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_nothing_is_evaluated_or_unpickled(path: Path) -> None:
    tree = tree_of(path)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    dotted = {ast.unparse(call.func) for call in calls if isinstance(call.func, ast.Attribute)}
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert not imported & {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if path.name == "import_hf.py":  # what others pickled is read, but nothing of it is run
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert all("weights_only=True" in ast.unparse(load) for load in loads)
        assert {name for name in dotted if name.startswith("pickle.")} == {"pickle.UnpicklingError"}
    else:
        assert not dotted & {"torch.load", "torch.save"} and "pickle" not in imported


def test_scripts_run_nothing_at_import() -> None:
    """Beside imports, definitions and constants, a script has only its `if __name__` line."""
    quiet = (
        ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign
    )
    for path in python_files("scripts"):
        for node in tree_of(path).body[1:]:
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert guard or isinstance(node, quiet), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: path.name)
def test_shell_scripts_fail_fast(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    if path.name == "setup.sh":  # sourced; its child process is what works, see its header
        assert "set -euo pipefail" in lines
    else:
        assert lines[0] == "set -euo pipefail"


def test_no_address_of_a_registry_in_the_locks() -> None:
    """Locks hold names, versions and hashes, so that they install from any mirror."""
    for name in ("requirements.lock", "requirements-test.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "--index" not in text
        pins = [line for line in text.splitlines() if line[:1].isalpha()]
        assert pins and all(re.match(r"[\w.-]+==\S+", pin) and pin.endswith("\\") for pin in pins)


@pytest.mark.parametrize("name", names([*LIBRARY, *python_files("dev")]))
def test_every_flag_says_what_it_is(name: str) -> None:
    """In a comment on its own line: else --help shows nothing, or the heading of its group."""
    lines = (ROOT / name).read_text().splitlines()
    for node in ast.walk(tree_of(ROOT / name)):
        if not isinstance(node, ast.ClassDef) or node.name not in (
            "Config",
            "FinetuneConfig",
            "ServerConfig",
        ):
            continue
        for field in (entry for entry in node.body if isinstance(entry, ast.AnnAssign)):
            own = lines[field.lineno - 1]
            assert field.lineno == field.end_lineno and "  # " in own, own
