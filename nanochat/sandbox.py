"""Run a model-written program, and the checks on it, in processes that can reach almost nothing.

On Linux each runs in its own bubblewrap: no network, no other processes, a file system of only the
system and Python (read-only) and a small /tmp, an empty environment. Everywhere they have limits on
time, memory, processes, open files and file sizes, and are killed with their groups at the
deadline. Without bubblewrap the limits are all there is: files can be read. sandbox_child.py
explains why a program cannot talk its way past the checks.

Root gets no user namespace but becomes a random user inside: the kernel never limits the number of
root's processes.

Sources: bwrap(1), 0.7 or newer; namespaces(7); setrlimit(2).
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from nanochat.common import UserError

CHILD = Path(__file__).with_name("sandbox_child.py").resolve()
PYTHON = Path(sys.executable).resolve()
PREFIX = PYTHON.parents[1]  # of Python's installation
SCRATCH_BYTES = 1 << 24  # of /tmp; counts as the machine's memory, not as the process's
MAX_SAID = 1 << 16  # bytes of what the checks say at their end; a pipe holds no more


@cache
def isolation() -> str | None:
    """Why programs cannot be isolated on this machine, found by trying; None if they can."""
    if not shutil.which("bwrap"):
        return "there is no bubblewrap; on Linux run `apt-get install bubblewrap`"
    if Path(os.path.expanduser("~")).is_relative_to(PREFIX):
        return f"Python's installation, {PREFIX}, has your files in it; use another Python"
    reason = _run("def f(): return 1", "f", "def check(f): assert f() == 1", 60.0, isolated=True)
    return f"bubblewrap does not work here ({reason})" if reason else None


def run_program(
    program: str, name: str, checks: str, seconds: float = 5.0, allow_unsafe: bool = False
) -> str:
    """Why the function `name` of `program` fails; "" if `check` of `checks` returns for it.

    Both are source code; `seconds` covers everything, Python's start included. Thread-safe. Raises
    UserError if programs cannot be isolated, unless `allow_unsafe`.
    """
    missing = isolation()
    if missing and not allow_unsafe:
        raise UserError(f"{missing}; --allow_unsafe_exec runs a model's programs as they are")
    return _run(program, name, checks, seconds, isolated=not missing)


def _run(program: str, name: str, checks: str, seconds: float, isolated: bool) -> str:
    arguments = (name, int(seconds) + 1, isolated)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        wire = socket.socketpair()
        with wire[0], wire[1]:  # open here only until each process has its end
            server = _process(Path(folder, "program.py"), program, wire[0], *arguments)
            stack.enter_context(server)
            checker = _process(Path(folder, "checks.py"), checks, wire[1], *arguments)
            judge = stack.enter_context(checker)
        try:
            status = judge.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"no verdict within {seconds:g} s"
        assert judge.stderr is not None
        lines = os.read(judge.stderr.fileno(), MAX_SAID).decode(errors="replace").split("\n")
    reason = [f"status {status}", *filter(None, lines)][-1]  # a traceback's last line
    return reason if status else ""


@contextmanager
def _process(
    file: Path, source: str, wire: socket.socket, name: str, seconds: int, isolated: bool
) -> Iterator[subprocess.Popen]:
    """The process for a module, written to `file`; killed with its group at the end."""
    file.write_bytes(source.encode(errors="replace"))
    file.chmod(0o644)
    # Two with the same user by chance would share one limit on processes, and nothing else.
    uid = 20_000 + secrets.randbelow(40_000) if isolated and os.getuid() == 0 else 0
    isolate = _bubblewrap(PREFIX, CHILD, file.resolve()) if isolated else []
    numbers = map(str, (wire.fileno(), seconds, uid))
    command = [*isolate, str(PYTHON), "-I", "-S", str(CHILD), file.stem, name, *numbers]
    errors = subprocess.PIPE if file.stem == "checks" else subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=file.parent, env={}, pass_fds=[wire.fileno()], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _bubblewrap(*readable: Path) -> list[str]:
    """The command prefix that isolates a command, with these paths readable."""
    namespaces = ["--unshare-all"]
    if os.getuid() == 0:
        namespaces = ["--unshare-" + kind for kind in ("ipc", "pid", "net", "uts", "cgroup-try")]
        namespaces += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    view = ["--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib64"):
        view += ["--ro-bind-try", path, path]
    view += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for path in readable:
        for parent in reversed(path.parents[:-1]):  # closed to all but root if left to bwrap
            view += ["--perms", "0755", "--dir", str(parent)]
        view += ["--ro-bind", str(path), str(path)]
    bwrap = shutil.which("bwrap") or "bwrap"
    return [bwrap, *namespaces, "--die-with-parent", "--new-session", *view, "--remount-ro", "/"]
