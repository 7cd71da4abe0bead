"""The sandbox against hostile programs: none gets out, none passes falsely, each is over in time,
nothing is left.

A program of the table either tries to cheat, and its checks must not pass; or it tries to get out
and tells its checks how that went, and they must. What gets out without bubblewrap is shown by the
same programs.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from string import Template
from textwrap import dedent

import pytest

from nanochat import sandbox
from nanochat.sandbox import isolation, run_program
from tests.models import refuses

MARK = f"f_{time.time_ns()}"  # the function's name; the command lines of all processes show it
SHORT = 1.0  # seconds, for what only the deadline ends
LONG = 30.0  # for what ends by itself, on a busy machine
SQUARES = "def check(f):\n    assert [f(2), f(3), f(10)] == [4, 9, 100]"
BLOCKED = "def check(f):\n    assert f() == 'blocked'"

# why they do not pass: the begin of the reason -> name -> program
CHEATS = {
    "the program ended": {
        "exits when imported": "import sys; sys.exit(0)",
        "exits when called": """
            import os
            def $f(x): os._exit(0)
            """,
        "exits at the end": """
            import atexit, os, sys
            atexit.register(os._exit, 0)
            sys.exit(1)
            """,
        "kills all that it can": """
            import os, signal
            def $f(x):
                for pid in (-1, os.getppid(), 0):
                    try: os.kill(pid, signal.SIGKILL)
                    except OSError: pass
            """,
        "recurses without a limit": """
            import sys
            sys.setrecursionlimit(10**9)
            def $f(x): return max([x], key=lambda each: $f(each))
            """,
    },
    "AssertionError": {
        "says that it passed": """
            import sys
            def $f(x):
                print('passed', 'OK', 0, file=sys.stderr)
                print(True)
            """,
        "writes a value into every descriptor": r"""
            import os
            def $f(x):
                for fd in range(1024):
                    try: os.write(fd, b'(True, 4)\n')
                    except OSError: pass
            """,
        "swallows everything": """
            import builtins
            builtins.AssertionError = type('Quiet', (Exception,), {})
            def $f(x):
                try: raise AssertionError
                except BaseException: return None
            """,
        "is a number that equals everything": """
            class Yes(int):
                def __eq__(self, other): return True
            def $f(x): return Yes(1)
            """,
        "traces the asserts away": """
            import sys
            def skip(frame, *_):
                frame.f_trace_lines = False
                return None
            sys.settrace(skip)
            def $f(x): return 0
            """,
        "takes the other end's modules over": """
            import sys, types
            checks = types.ModuleType('checks')
            checks.check = lambda f: None
            sys.modules['checks'] = checks
            main = sys.modules['__main__']
            main.plain = lambda value: value
            main.check = lambda *_: sys.exit(0)
            def $f(x): return 0
            """,
        "reads the answers in the caller": """
            import sys
            def $f(x):
                frame = sys._getframe()
                while frame := frame.f_back:
                    for each in frame.f_code.co_consts:
                        if isinstance(each, tuple) and len(each) == 3:
                            return dict(zip((2, 3, 10), each))[x]
            """,
    },
    "ValueError": {
        "writes code into every descriptor": r"""
            import os
            def $f(x):
                for fd in range(1024):
                    try: os.write(fd, b'__import__("os")._exit(0)\n')
                    except OSError: pass
            """,
    },
    "the program ended, or replied more": {
        "returns 5 MB": "def $f(x): return 'x' * 5_000_000",
    },
    "RuntimeError: TypeError: a Yes cannot be passed on": {
        "equals everything": """
            class Yes:
                def __eq__(self, other): return True
            def $f(x): return Yes()
            """,
    },
    "RuntimeError: RecursionError": {
        "recurses": "def $f(x): return $f(x)",
    },
    "RuntimeError: SyntaxError": {
        "is no Python": "def $f(x): return [",
    },
    "RuntimeError: MemoryError": {
        "eats memory bit by bit": """
            def $f(x):
                kept = []
                while True: kept.append(bytearray(1 << 20))
            """,
    },
    "no verdict within 1 s": {
        "loops": """
            def $f(x):
                while True: pass
            """,
        "sleeps, deaf to signals": """
            import signal, time
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(each, signal.SIG_IGN)
            def $f(x): time.sleep(600)
            """,
        "replies with brackets, on which a parser is slow": r"""
            import os
            def $f(x):
                for fd in range(1024):
                    try: os.write(fd, b'(' * 99_999 + b'\n')
                    except OSError: pass
            """,
        "prints without end": """
            import sys
            def $f(x):
                while True: print('x' * 9999), print('x', file=sys.stderr)
            """,
        "forks without end": """
            import os
            def $f(x):
                while True:
                    try: os.fork()
                    except OSError: pass
            """,
    },
}
# The action of a function $f() that says "blocked" where it raises.
ESCAPES = {
    "reads a secret": "open('$secret').read()",
    "connects out": "socket.create_connection(('127.0.0.1', $port), 1)",
    "connects to an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0$f')",
    "writes outside": "open('$folder/new', 'w').write('x')",
    "deletes files": "os.remove('$secret')",
    "follows a link to /etc": "os.symlink('/etc', '/tmp/link'), open('/tmp/link/passwd')",
    "reads the environment": "os.environ['PLANTED']",
    "kills its maker": "os.kill($pid, 9)",
    "traces its maker": "ctypes.CDLL(None).ptrace(16, $pid, 0, 0) == 0 or 1 / 0",
    "looks at processes": "os.listdir('/proc/$pid')",
    "becomes root": "os.setuid(0)",
    "mounts": "ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0 or 1 / 0",
    "writes to the system": "open('/usr/lib/new', 'w')",
    "changes the interpreter": "open(os.__file__, 'a')",
    "reads the checks": "open('checks.py').read()",
    "takes 10 GB": "bytearray(10 << 30)",
    "starts a hundred threads": "[threading.Timer(9, print).start() for _ in range(100)]",
    "fills the disk": "[open(f'/tmp/{i}', 'wb').write(bytes(1 << 20)) for i in range(100)]",
    "writes one big file": "open('/tmp/big', 'wb').write(bytes(100 << 20))",
    "opens a thousand files": "[os.dup(2) for _ in range(1000)]",
}
REACH = """
    import ctypes, os, socket, threading, time
    def $f():
        try:
            $action
        except Exception: return 'blocked'
        return 'done'
    """
# Outlives its parent in a session of its own, holding on to every descriptor.
STRAY = """
    import os, sys, time
    def $f(x):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                wait = 'import time; time.sleep(600)'
                os.execv(sys.executable, [sys.executable, '-c', wait, '$f'])
            time.sleep(600)
        return x * x
    """
# name -> (program, checks, seconds, what the reason begins with, or "" where the checks must pass)
TABLE = {
    name: (program, SQUARES, SHORT if "within 1 s" in reason else LONG, reason)
    for reason, programs in CHEATS.items()
    for name, program in programs.items()
}
TABLE |= {name: (REACH.replace("$action", act), BLOCKED, LONG, "") for name, act in ESCAPES.items()}
TABLE["leaves a child in a session of its own"] = (STRAY, SQUARES, LONG, "")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What a program could reach if it got out, by the names that the programs have for it."""
    folder = tmp_path_factory.mktemp("outside")
    secret = folder / "secret"
    secret.write_text("planted")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{MARK}")
        abstract.listen()
        port = listener.getsockname()[1]
        names = {"f": MARK, "pid": os.getpid(), "port": port}
        yield {**names, "secret": secret, "folder": folder}
        assert os.listdir(folder) == ["secret"] and secret.read_text() == "planted"


def run(name: str, outside: dict[str, object], allow_unsafe: bool = False) -> tuple[str, float]:
    """(why it did not pass, seconds that it took beyond its limit)"""
    program, checks, seconds, _ = TABLE[name]
    program = Template(dedent(program)).substitute(outside)
    begin = time.monotonic()
    reason = run_program(program, MARK, checks, seconds, allow_unsafe=allow_unsafe)
    return reason, time.monotonic() - begin - seconds


@pytest.fixture(scope="module")
def outcomes(outside: dict[str, object]) -> dict[str, tuple[str, float]]:
    """All hostile programs, four at a time."""
    if missing := isolation():
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setenv("PLANTED", "secret")
        return dict(zip(TABLE, pool.map(lambda name: run(name, outside), TABLE), strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_a_hostile_program_is_held(name: str, outcomes: dict[str, tuple[str, float]]) -> None:
    reason, late = outcomes[name]
    wanted = TABLE[name][-1]
    assert reason.startswith(wanted) and bool(reason) == bool(wanted), reason
    assert late < 5.0  # measured: 0.1 s; a busy machine takes its time to end a process


def test_no_process_is_left(outcomes: dict[str, tuple[str, float]]) -> None:
    """The kernel ends the processes of a namespace shortly after it was told to."""

    def left() -> list[str]:
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has just ended
                found += [str(file)] if MARK.encode() in file.read_bytes() else []
        return found

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


def test_the_escapes_work_where_nothing_holds_them(
    outside: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that "blocked" above means something; and without isolation nothing runs unless it is
    waived.
    """
    monkeypatch.setattr(sandbox, "isolation", lambda: "there is none")
    monkeypatch.setenv("PLANTED", "secret")
    held = ("reads a secret", "connects out", "connects to an abstract socket", "reads the checks")
    for name in held:
        refuses("there is none; --allow_unsafe_exec", run, name, outside)
        assert run(name, outside, allow_unsafe=True)[0] == "AssertionError", name
    assert run("takes 10 GB", outside, allow_unsafe=True)[0] == ""  # the limits hold everywhere
    assert run("reads the environment", outside, allow_unsafe=True)[0] == ""


def test_the_cheats_work_on_checks_that_share_their_interpreter(outside: dict[str, object]) -> None:
    equal, caller = "is a number that equals everything", "reads the answers in the caller"
    for name in ("exits when called", equal, caller):
        program = Template(dedent(TABLE[name][0])).substitute(outside)
        shared = f"{program}\n{SQUARES}\ncheck({MARK})"
        assert subprocess.run([sys.executable, "-I", "-S", "-c", shared]).returncode == 0, name


# --- programs that mean well

PROGRAM = r"""
import collections, enum
Point = collections.namedtuple("Point", "x y")
class Size(enum.IntEnum):
    BIG = 3
def given(kind, *, deep):
    return {
        "point": Point(1, 2),
        "counter": collections.Counter("aab"),
        "size": [Size.BIG, True],
        "sets": [set(), {1}],
        "big": [10**400, -0.0, 1e-300],
        "back": deep,
        "right": deep == {"a": [(1, 2.5), {3}, None, True, b"x", 2j, "\u00e9\n'\ud800"]},
    }[kind]
"""
CHECKS = r"""
def check(given):
    deep = {"a": [(1, 2.5), {3}, None, True, b"x", 2j, "\u00e9\n'\ud800"]}
    assert given("point", deep=deep) == (1, 2)
    assert given("counter", deep=deep) == {"a": 2, "b": 1}
    assert given("size", deep=deep) == [3, True] and given("size", deep=deep)[1] is True
    assert given("sets", deep=deep) == [set(), {1}]
    assert given("big", deep=deep) == [10**400, 0.0, 1e-300]
    assert given("back", deep=deep) == deep and given("right", deep=deep) is True
    assert globals()["given"] is given
    try:
        given("lost", deep=deep)
    except RuntimeError as error:
        assert str(error) == "KeyError: 'lost'"
    else:
        assert False
"""


def test_values_and_exceptions_come_back_as_they_are() -> None:
    assert run_program(PROGRAM, "given", CHECKS, LONG, allow_unsafe=True) == ""
    for name, once, said in (
        ("given", "def check(f): f('lost', deep=0)", "RuntimeError: KeyError: 'lost'"),
        ("missing", "def check(f): f()", "has no attribute 'missing'"),
    ):
        assert said in run_program(PROGRAM, name, once, LONG, allow_unsafe=True)


def test_why_there_is_no_isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in str(isolation.__wrapped__())
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    reason = str(isolation.__wrapped__())
    assert reason.endswith("does not work here (bwrap: No permissions to create a namespace)")
    monkeypatch.setenv("HOME", str(sandbox.PREFIX / "me"))  # which the sandbox would show
    assert "has your files in it" in str(isolation.__wrapped__())
