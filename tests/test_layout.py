"""The map is true, imports go one way along it, and the house rules that a machine can see.

The oracle of the order is the map in nanochat/__init__.py, read as text; imports are read from the
syntax trees, so nothing is run.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("primer", "nanochat", "tasks", "scripts")
TOY_TASKS = ("primer.py", "visitor.py", "mixtures.py")


def python_files(*folders: str) -> list[Path]:
    return files_of("*.py", *folders)


def files_of(pattern: str, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob(pattern))


LIBRARY = python_files(*PACKAGES)
ALL = python_files(*PACKAGES, "tests", "dev")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


@cache
def module_map() -> list[str]:
    """Module names in the order of nanochat/__init__.py: the first words of its indented lines."""
    docstring = ast.get_docstring(tree_of(ROOT / "nanochat/__init__.py")) or ""
    return re.findall(r"^    (\w+) {2,}\S", docstring, flags=re.MULTILINE)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, inside functions too."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def strings_of(path: Path) -> list[str]:
    """The string constants of a file that are not docstrings."""
    statements = [node.value for node in nodes_of(path) if isinstance(node, ast.Expr)]
    constants = [node for node in nodes_of(path) if isinstance(node, ast.Constant)]
    return [n.value for n in constants if isinstance(n.value, str) and n not in statements]


def shell_scripts() -> list[Path]:
    return [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("dev/**/*.sh")), ROOT / ".ci/run"]


def test_the_map_lists_every_module_once_and_holds_no_code() -> None:
    there = {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"}
    assert sorted(module_map()) == sorted(there)
    assert len(tree_of(ROOT / "nanochat/__init__.py").body) == 1


def test_library_imports_only_from_above_on_the_map() -> None:
    """And dataset alone from the primer, which imports nothing else of ours."""
    order = module_map()
    for number, module in enumerate(order):
        for name in imported_modules(ROOT / f"nanochat/{module}.py"):
            package, _, rest = name.partition(".")
            if (package, module) != ("primer", "dataset"):
                is_above = package == "nanochat" and rest.split(".")[0] in order[:number]
                assert is_above, f"{module} imports {name}, which is not above it on the map"
    for path in python_files("primer"):
        assert all(name.split(".")[0] == "primer" for name in imported_modules(path)), path


def test_tasks_come_before_scripts_and_scripts_import_no_scripts() -> None:
    for path in python_files("tasks", "scripts"):
        # plan adds up what the others do by default; no real task needs a toy.
        banned = () if path.name == "plan.py" else ("scripts",)
        if path.parent.name == "tasks" and path.name not in TOY_TASKS:
            banned += ("primer", "tasks.primer")
        assert not [name for name in imported_modules(path) if name.startswith(banned)], path


def test_only_the_tokenizer_spells_special_tokens() -> None:
    spellers = [path for path in LIBRARY if any("<|" in text for text in strings_of(path))]
    assert names(spellers) == ["nanochat/tokenizer.py"]


def test_every_file_begins_with_a_docstring() -> None:
    assert not [path for path in ALL if not ast.get_docstring(tree_of(path))]


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_nothing_is_evaluated_or_unpickled(path: Path) -> None:
    called = {ast.unparse(node.func) for node in nodes_of(path) if isinstance(node, ast.Call)}
    imported = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert not imported & {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if path.name == "import_hf.py":  # what others pickled is read, but nothing of it is run
        loads = [line for line in path.read_text().splitlines() if "torch.load(" in line]
        assert all("weights_only=True" in line for line in loads)
        assert {name for name in called if name.startswith("pickle.")} == {"pickle.UnpicklingError"}
    else:
        assert not called & {"torch.load", "torch.save"} and "pickle" not in imported


def test_scripts_run_nothing_at_import() -> None:
    """Beside imports, definitions and constants, a script has only its `if __name__` line."""
    imports, definitions = ast.Import | ast.ImportFrom, ast.ClassDef | ast.FunctionDef
    quiet = imports | definitions | ast.Assign | ast.AnnAssign
    for path in python_files("scripts"):
        for node in tree_of(path).body[1:]:
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert guard or isinstance(node, quiet), f"{path.name}:{node.lineno}"


def test_shell_scripts_fail_fast() -> None:
    for path in shell_scripts():
        shebang, *lines = path.read_text().splitlines()
        code = [line for line in lines if line and not line.startswith("#")]
        assert shebang == "#!/usr/bin/env bash", path
        # setup.sh is sourced; its child process is what works, see its header.
        assert "set -euo pipefail" in (code if path.name == "setup.sh" else code[:1]), path


def test_no_address_of_a_registry_in_the_locks() -> None:
    """Locks hold names, versions and hashes, so that they install from any mirror."""
    for name in ("requirements.lock", "requirements-test.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "--index" not in text
        pins = [line for line in text.splitlines() if line[:1].isalpha()]
        assert pins and all(re.match(r"[\w.-]+==\S+", pin) and pin.endswith("\\") for pin in pins)


def table_lines(path: Path) -> set[int]:
    """Numbers of the lines of statements marked `# fmt: skip`, and those inside `# fmt: off`."""
    found, is_off = set(), False
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        is_off = (is_off or line.strip() == "# fmt: off") and line.strip() != "# fmt: on"
        found |= {number} if is_off else set()
    simple = [n for n in nodes_of(path) if isinstance(n, ast.stmt) and not hasattr(n, "body")]
    decorators = [d for node in nodes_of(path) for d in getattr(node, "decorator_list", [])]
    for node in [*simple, *decorators]:
        end = node.end_lineno or node.lineno
        found |= set(range(node.lineno, end + 1)) if "# fmt: skip" in lines[end - 1] else set()
    return found


def test_only_tables_are_wider_than_100_columns() -> None:
    page = [path for kind in ("js", "css", "html") for path in files_of(f"*.{kind}", "nanochat/ui")]
    ours = [path for path in page if path.parent.name != "vendor"]
    wide = []
    for path in [*ALL, *shell_scripts(), *ours, *files_of("*.rs", "rustbpe/src", "rustbpe/tests")]:
        tables = table_lines(path) if path.suffix == ".py" else set()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100 and number not in tables:
                wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("name", names([*LIBRARY, *python_files("dev")]))
def test_every_flag_says_what_it_is(name: str) -> None:
    """In a comment on its own line: else --help shows nothing, or the heading of its group."""
    lines = (ROOT / name).read_text().splitlines()
    configs = ("Config", "FinetuneConfig", "ServerConfig", "CheckpointFlags")
    configs += ("RunFlags", "StreamFlags", "ModelFlags")
    for node in nodes_of(ROOT / name):
        if isinstance(node, ast.ClassDef) and node.name in configs:
            for field in (entry for entry in node.body if isinstance(entry, ast.AnnAssign)):
                own = lines[field.lineno - 1]
                assert field.lineno == field.end_lineno and "  # " in own, own
