"""setup.sh against stand-ins for uv, cargo and nvidia-smi that write down how they were called.

The real installation is what `bash test.sh` begins with; here is what must hold around it: the
order of the steps, which of them run again, where the caller ends up, and that a failure stops it.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE_UV = """#!/bin/sh
echo "uv $*" >> "$CALLS"
case "$*" in *"$UV_FAILS_ON"*)
    [ -z "$UV_FAILS_ON" ] || { printf 'error: none\n  cause: dns: no such host\n'; exit 3; }
esac
case "$*" in *"-r -") cat > "$CALLS.lock" ;; esac
if [ "$1" = venv ]; then
    mkdir -p .venv/bin
    printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$PYTHON" > .venv/bin/python
    chmod +x .venv/bin/python
    echo 'VIRTUAL_ENV=active' > .venv/bin/activate
fi
"""


class Sandbox:
    """A copy of what setup.sh reads, a home of its own, and a PATH that holds stand-ins."""

    def __init__(self, folder: Path):
        self.repo, self.bin, self.calls = folder / "a repo", folder / "bin", folder / "calls"
        (self.repo / "rustbpe/src").mkdir(parents=True)
        for name in ("setup.sh", "pyproject.toml", "requirements.lock", "requirements-test.lock"):
            shutil.copy(ROOT / name, self.repo)
        (self.repo / "rustbpe/Cargo.toml").write_text("[package]\n")
        (self.repo / "rustbpe/src/lib.rs").write_text("// first\n")
        self.bin.mkdir()
        self.stand_in("uv", FAKE_UV)
        self.stand_in("cargo", "#!/bin/sh\n")
        self.stand_in("cc", "#!/bin/sh\n")
        self.stand_in("uname", "#!/bin/sh\necho Darwin\n")  # which has one build of torch
        self.environment = {"HOME": str(folder), "CALLS": str(self.calls), "PYTHON": sys.executable}
        self.environment |= {"PATH": f"{self.bin}:/usr/bin:/bin", "UV_FAILS_ON": ""}

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def source(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a strict script that sources setup.sh and then says where it is."""
        setup = f'source "{self.repo}/setup.sh" {" ".join(arguments)}'
        script = f'set -euo pipefail\n{setup}\necho "in $PWD, $VIRTUAL_ENV"\n'
        own = {"cwd": cwd or self.repo, "env": self.environment | environment}
        return subprocess.run(["bash", "-c", script], **own, capture_output=True, text=True)

    def called(self) -> list[str]:
        """The calls of uv since the last time this was asked."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return calls


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


INSTALL = "uv pip install --python .venv/bin/python"
LOCK = f"{INSTALL} --require-hashes -r requirements.lock"
TEST_LOCK = f"{INSTALL} --require-hashes -r requirements-test.lock"
BUILD = f"{INSTALL} --no-deps --no-build-isolation -e ."
TORCH = re.findall("^torch==[^ ]+", (ROOT / "requirements.lock").read_text(), re.M)[0]
CPU_TORCH = f"{INSTALL} --no-deps --torch-backend=cpu {TORCH}"
CPU_BUILD = [f"{CPU_TORCH} --dry-run", CPU_TORCH, f"{INSTALL} --require-hashes -r -"]


def test_first_run_installs_in_order_and_second_does_nothing(sandbox: Sandbox) -> None:
    first = sandbox.source(cwd=Path("/"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"in {sandbox.repo}, active"
    venv, *rest = sandbox.called()
    assert venv.startswith("uv venv") and "--python >=3.11,<3.14" in venv
    assert rest == [LOCK, BUILD]
    second = sandbox.source()
    assert second.returncode == 0 and sandbox.called() == []


def test_only_what_changed_is_done_again(sandbox: Sandbox) -> None:
    sandbox.source()
    sandbox.called()
    for name, step in (("rustbpe/src/lib.rs", BUILD), ("requirements.lock", LOCK)):
        with (sandbox.repo / name).open("a") as file:
            file.write("# another line\n")
        sandbox.source()
        assert sandbox.called() == [step]
    sandbox.source("--tests")
    assert sandbox.called() == [TEST_LOCK]
    (sandbox.repo / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")  # another Python's
    sandbox.source()
    assert sandbox.called()[0].startswith("uv venv")


def test_a_failed_step_stops_the_caller_and_is_tried_again(sandbox: Sandbox) -> None:
    failed = sandbox.source(UV_FAILS_ON="requirements.lock")
    assert failed.returncode != 0 and "in /" not in failed.stdout
    sandbox.called()
    assert sandbox.source().returncode == 0
    assert sandbox.called() == [LOCK, BUILD]


def test_cargo_is_found_in_its_home_and_uv_beside_the_repository(sandbox: Sandbox) -> None:
    homes = {"cargo": sandbox.bin.parent / ".cargo/bin", "uv": sandbox.repo / ".uv/bin"}
    for name, home in homes.items():
        home.mkdir(parents=True)
        shutil.move(sandbox.bin / name, home / name)
    assert sandbox.source().returncode == 0
    assert sandbox.called()[1:] == [LOCK, BUILD]


def test_a_gpu_that_torch_does_not_see_stops_with_one_line(sandbox: Sandbox) -> None:
    sandbox.stand_in("nvidia-smi", "#!/bin/sh\n")
    torch = sandbox.bin / "torch.py"
    sandbox.environment["PYTHONPATH"] = str(sandbox.bin)
    torch.write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    stopped = sandbox.source()
    assert stopped.returncode != 0 and len(stopped.stderr.splitlines()) == 1
    assert "pip install --torch-backend=auto" in stopped.stderr
    assert "--device_type=cpu" in stopped.stderr
    for arguments in (("--device_type=cpu",), ("--device-type", "cpu")):
        assert sandbox.source(*arguments).returncode == 0
    torch.write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    assert sandbox.source().returncode == 0


# What the machine has, what set-up is told, and the calls of uv that install the lock.
BUILDS = {
    "no GPU": ("Linux", "", "", "", CPU_BUILD),
    "no GPU, PyTorch's index out of reach": ("Linux", "", "", "--dry-run", [CPU_BUILD[0], LOCK]),
    "a GPU to come": ("Linux", "", "--device-type=cuda", "", [LOCK]),
    "a GPU": ("Linux", "nvidia-smi", "", "", [LOCK]),
    "a GPU, to be left alone": ("Linux", "nvidia-smi", "--device_type=cpu", "", [LOCK]),
    "a GPU without nvidia-smi": ("Linux", "ls", "", "", [LOCK]),
    "a Mac": ("Darwin", "", "", "", [LOCK]),
}


@pytest.mark.parametrize("case", BUILDS)
def test_the_build_of_torch_that_suits_the_machine(sandbox: Sandbox, case: str) -> None:
    system, shows_gpu, flags, fails_on, calls = BUILDS[case]
    if not shows_gpu and shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has a GPU")
    sandbox.stand_in("uname", f"#!/bin/sh\necho {system}\n")
    hidden = 0 if shows_gpu == "ls" else 1
    listing = f'#!/bin/sh\ncase "$*" in /dev/nvidia*) exit {hidden} ;; esac\nexec /bin/ls "$@"\n'
    sandbox.stand_in("ls", listing)
    if shows_gpu == "nvidia-smi":
        sandbox.stand_in("nvidia-smi", "#!/bin/sh\n")
    (sandbox.bin / "torch.py").write_text("class cuda:\n    is_available = lambda: True\n")
    done = sandbox.source(flags, UV_FAILS_ON=fails_on, PYTHONPATH=str(sandbox.bin))
    assert done.returncode == 0, done.stderr
    assert sandbox.called()[1:] == [*calls, BUILD]
    size = {CPU_TORCH: "0.4 GB", LOCK: "3 GB"}[calls[-1] if LOCK in calls else calls[1]]
    assert (f"downloading about {size}" in done.stdout) == (system == "Linux")
    assert ("(no such host)" in done.stdout) == bool(fails_on)
    again = sandbox.source(flags, UV_FAILS_ON=fails_on, PYTHONPATH=str(sandbox.bin))
    assert again.returncode == 0 and sandbox.called() == []


def test_beside_the_cpu_build_no_library_of_cuda_is_installed(sandbox: Sandbox) -> None:
    sandbox.stand_in("uname", "#!/bin/sh\necho Linux\n")
    sandbox.source()
    whole, given = (sandbox.repo / "requirements.lock", Path(f"{sandbox.calls}.lock"))
    pins = [re.split(r"\n(?=\S)", path.read_text().strip()) for path in (whole, given)]
    assert all("--hash=sha256:" in pin for pin in pins[1]) and set(pins[1]) < set(pins[0])
    gone = {pin.split("==")[0] for pin in set(pins[0]) - set(pins[1])}
    assert {"torch", "triton", "nvidia-cublas", "nvidia-nccl-cu13", "cuda-toolkit"} <= gone
    project = tomllib.loads((sandbox.repo / "pyproject.toml").read_text())["project"]
    needed = {entry.split("==")[0] for entry in project["dependencies"]}
    assert needed & gone == {"torch"} and len(pins[1]) > 60


def test_a_cuda_build_stays_when_the_lock_changes(sandbox: Sandbox) -> None:
    sandbox.stand_in("uname", "#!/bin/sh\necho Linux\n")
    sandbox.source("--device_type=cuda")
    (sandbox.repo / ".venv/lib/python3.12/site-packages/triton").mkdir(parents=True)
    sandbox.called()
    sandbox.source()
    assert sandbox.called() == []
    with (sandbox.repo / "requirements.lock").open("a") as file:
        file.write("# another line\n")
    sandbox.source()
    assert sandbox.called() == [LOCK]


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock, set-up does not lock")
def test_two_set_ups_take_turns(sandbox: Sandbox) -> None:
    sandbox.stand_in("uv", FAKE_UV.replace('echo "uv', 'sleep 0.1; echo "uv'))
    script = f'source "{sandbox.repo}/setup.sh"'
    options = {"env": sandbox.environment, "stdout": subprocess.DEVNULL}
    both = [subprocess.Popen(["bash", "-c", script], **options) for _ in range(2)]
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert sandbox.called()[1:] == [LOCK, BUILD]
