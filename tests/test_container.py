"""The Dockerfile: what can be read off it, how its processes end, and the image where one builds.

`docker stop` is acted out by processes with a pid space of their own, whose end kills them all, as
a container's does.
"""

import json
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and line[0] != "#"]
IGNORED = (ROOT / ".dockerignore").read_text().split()
ALONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


def all_of(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def copied() -> list[str]:
    return [word for rest in all_of("COPY") for word in rest.split()[:-1] if word[0] != "-"]


def test_the_base_is_pinned_and_nothing_runs_as_root() -> None:
    names = [name for name, _ in STEPS]
    assert all(re.fullmatch(r"[\w./-]+:\d[\w.-]*", image) for image in all_of("FROM"))
    assert names[0] == "FROM" and len(all_of("FROM")) == 1
    assert all_of("USER") == ["nanochat"] and "useradd --create-home nanochat" in TEXT
    assert names.index("USER") < names.index("COPY")
    assert all(step.startswith("--chown=nanochat ") for step in all_of("COPY"))
    variables = {re.split("[ =]", rest)[0] for rest in all_of("ARG")}
    (set_up,) = [number for number, step in enumerate(STEPS) if "setup.sh --" in step[1]]
    assert variables == {"DEVICE"} and names.index("ARG") < set_up
    assert STEPS[set_up] == [
        "RUN",
        "bash setup.sh --device_type=$DEVICE && rm -rf ~/.cache ~/.cargo",
    ]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in copied():
        assert (ROOT / name).exists()
        assert not any(fnmatch(name, pattern.removeprefix("**/")) for pattern in IGNORED)
    for name in tracked.split():
        for pattern in IGNORED:  # without **/ it means the root alone
            parts = name.split("/")[:1] if "/" not in pattern else name.split("/")
            left_out = [part for part in parts if fnmatch(part, pattern.removeprefix("**/"))]
            assert not left_out, f".dockerignore leaves out {name}"
    assert {"setup.sh", "pyproject.toml", "requirements.lock", "rustbpe", "."} <= set(copied())


def test_every_command_is_there() -> None:
    assert (ROOT / json.loads(all_of("CMD")[0])[1]).exists()
    told = (ROOT / "Dockerfile").read_text()
    for script in re.findall(r"bash (\w+\.sh)", told):
        assert (ROOT / script).exists()
    for module in re.findall(r"-m (scripts\.\w+)", told):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert "--host 0.0.0.0" in told and "NANOCHAT_API_KEY" in told


@pytest.mark.skipif(
    not shutil.which("tini")
    or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0,
    reason="needs tini, and pid spaces for this user",
)
def test_a_stopped_container_lets_the_trainer_save(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(
        "import signal, sys, time\n"
        "def save(number, _):\n    time.sleep(0.3)\n    open('saved', 'w')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('training', flush=True)\nsignal.pause()\n"
    )
    tier = "set -e\npython3 trainer.py\ntouch next_stage\n"
    (tmp_path / "tier.sh").write_text(tier)
    start = [*ALONE, *json.loads(all_of("ENTRYPOINT")[0]), "bash", "tier.sh"]
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as container:
        assert container.stdout is not None and container.stdout.readline() == "training\n"
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text()
        subprocess.run(["kill", "-TERM", children.split()[0]], check=True)  # pid 1 in there
        assert container.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists() and not (tmp_path / "next_stage").exists()


@pytest.mark.long
def test_the_image_builds_and_starts_without_a_network() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    found = [name for name in ("docker", "podman") if shutil.which(name)]
    builder = next((name for name in found if run(name, "info").returncode == 0), "")
    if not builder or run(builder, "pull", all_of("FROM")[0]).returncode != 0:
        pytest.skip("needs docker or podman, and a registry with the base image")
    built = run(builder, "build", "-t", "nanochat-test", ".")
    assert built.returncode == 0, built.stderr[-3000:]
    set_up = "source setup.sh && python -m scripts.plan --depth 4"
    done = run(builder, "run", "--rm", "--network=none", "nanochat-test", "bash", "-c", set_up)
    assert done.returncode == 0 and "depth 4" in done.stdout, done.stderr[-3000:]
