"""The command line of a script: the flags that several share, what their values may be, and `run_script`.

A script's flags are the fields of its `Config`; tyro reads them, and each field's comment is its line in --help. What
a value may be stands in its type (`Count`, `Share`, ...), and is checked before anything begins.
"""

import errno
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import torch.distributed as dist
import tyro
from pydantic import Field, TypeAdapter, ValidationError

from nanochat.paths import FOLDER_NAME, UserError

# Flags that choose a checkpoint, and their short names.
Source = Annotated[str, tyro.conf.arg(aliases=["-i"])]
ChatSource = Annotated[Literal["mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])]
TagName = Annotated[str, Field(pattern=rf"^({FOLDER_NAME})?$")]
Tag = Annotated[TagName, tyro.conf.arg(aliases=["-g"])]
StepNumber = Annotated[int | None, tyro.conf.arg(aliases=["-s"])]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Derived = Literal[-1] | Count  # -1: it follows from other flags
Rows = Literal["auto"] | Count
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]

# What is wrong with the machine or a path, and not with the program.
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}

Config = TypeVar("Config")


def run_script(main: Callable[[Config], None], config: type[Config]) -> None:
    """Run `main` on the parsed command line; what a user can mend becomes one line on stderr and exit code 1.

    --help begins with what the script's docstring says.
    """
    parsed = tyro.cli(config, description=main.__globals__["__doc__"])
    try:
        check(parsed)
        main(parsed)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        sys.exit(
            f"error: {error.filename or 'a file'}: {error.strerror}; make room or choose another path"
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check(config: Any) -> None:
    """Raise UserError for a value that its flag's type does not allow."""
    try:
        TypeAdapter(type(config)).validate_python(vars(config))
    except ValidationError as error:
        worst = error.errors()[-1]  # of a union's members, the last
        raise UserError(f"--{worst['loc'][0]}={worst['input']}: {worst['msg']}") from error
