"""Inside the sandbox: a program at one end of a wire, the checks on it at the other.

Two processes, each in its own sandbox, started by nanochat/sandbox.py as

    python -I -S sandbox_child.py program|checks NAME DESCRIPTOR SECONDS UID

One serves calls of the function NAME of program.py; the other passes a stand-in for it to `check`
of checks.py and exits with status 0 only if that returns. The wire carries Python literals in
ASCII, one a line: `((2,), {})` is a call, `(True, 4)` its value, `(False, 'ValueError: ...')` its
exception. The two share no interpreter, so what a program does to `assert`, `__eq__` or its output
stays at its end: the checks only see values, and pass only for the right ones.
"""

import ast
import importlib
import io
import os
import resource
import sys
from typing import Any

MAX_MESSAGE = 1 << 20  # bytes
LIMITS = {
    resource.RLIMIT_AS: 1 << 28,  # bytes of memory of one process
    resource.RLIMIT_NPROC: 8,  # processes and threads; of the whole user without bubblewrap
    resource.RLIMIT_FSIZE: 1 << 24,  # bytes of one file
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
}
SCALARS: tuple[type[Any], ...] = (int, float, complex, str, bytes)


def plain(value: Any) -> Any:
    """`value` in the types of literals, subclasses converted to them; else TypeError."""
    if value is None or isinstance(value, bool):
        return value
    for kind in SCALARS:
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    raise TypeError(f"a {type(value).__name__} cannot be passed on")


def write(wire: io.BufferedRWPair, value: Any) -> None:
    wire.write(ascii(plain(value)).encode() + b"\n")
    wire.flush()


def serve(wire: io.BufferedRWPair, name: str) -> None:
    """Answer the checks' calls of the program's function."""
    while line := wire.readline():
        args, kwargs = ast.literal_eval(line.decode())
        try:
            function = getattr(importlib.import_module("program"), name)
            reply = (True, plain(function(*args, **kwargs)))
        except Exception as error:
            reply = (False, f"{type(error).__name__}: {error}")
        write(wire, reply)


def check(wire: io.BufferedRWPair, name: str) -> None:
    """Run the checks; raises their errors, and RuntimeError for an exception of the program."""

    def candidate(*args: Any, **kwargs: Any) -> Any:
        write(wire, (args, kwargs))
        line = wire.readline(MAX_MESSAGE)
        if not line.endswith(b"\n"):
            sys.exit("the program ended, or replied more than 1 MiB")
        returned, value = ast.literal_eval(line.decode())
        if returned:
            return value
        raise RuntimeError(str(value)[:200])

    checks = importlib.import_module("checks")
    setattr(checks, name, candidate)  # some checks call the function by its own name
    checks.check(candidate)


def main(role: str, name: str, *numbers: str) -> None:
    descriptor, seconds, uid = map(int, numbers)
    if uid:  # root, in namespaces made without a new user: no limit on processes binds root
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for kind, limit in {**LIMITS, resource.RLIMIT_CPU: seconds}.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        if kind != resource.RLIMIT_AS or sys.platform != "darwin":  # a Mac refuses it
            resource.setrlimit(kind, (limit, limit))
    sys.path.append(os.getcwd())
    socket = io.FileIO(descriptor, "r+")
    (serve if role == "program" else check)(io.BufferedRWPair(socket, socket), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
