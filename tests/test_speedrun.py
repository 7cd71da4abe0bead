"""The tiers, killed in every stage and started again, with the same flags and with others.

First with stand-ins for python and torchrun, which note how often each run was started since its
folder was cleared. Then, as a long test, speedrun.sh itself with tiny sizes on two CPU processes,
with downloads from a hub on this machine that breaks transfers, lies about lengths and fails. The
oracle is the uninterrupted order of stages: each is done once, and the report holds them all.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import primer
from nanochat.trainer import FREE_SETTINGS
from tests.hub import Fault, Hub
from tests.test_core_eval import write_bundle
from tests.test_dataset import parquet
from tests.test_humaneval import ROW
from tests.test_tasks import DATASETS

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "tok_train", "tok_eval", "all_shards", "base_train", "base_loss", "base_eval", "mid_train",
    "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl",
]  # fmt: skip
FAULTS: dict[int, Fault] = {2: "error", 5: "longer", 8: "cut"}
TRAINERS = {"base_train": "base", "mid_train": "mid", "chat_sft": "sft", "chat_rl": "rl"}
# python and torchrun: a trainer adds a line to its run folder, which --fresh clears first.
STAND_IN = r"""#!/bin/sh
echo "$*" >>"$CALLS"
trap '[ -z "$NANOCHAT_STOPPED" ] || touch "$NANOCHAT_STOPPED"; exit 75' USR1
module="" tag="" fresh="" id="" run="" depth=24
for word; do
  case $word in
  --depth=*) depth=${word#*=} ;;
  --laptop | --minutes=*) printf '%s 7 60\n' base_train mid_train chat_sft chat_rl; exit ;;
  --hours=*) sizes="12 ${PLANNED_RATIO:-10.5} 7 8 0 640 62 6553600 248" ;;
  --only) echo "${sizes:-$depth 12 4 4 1 0 0 0 0}"; exit ;;
  scripts.* | nanochat.*) [ -n "$module" ] || module=${word#*.} ;;
  --model_tag=*) tag=${word#*=} ;;
  --rdzv_id=*) id=${word#*=} ;;
  --fresh) fresh=1 ;;
  esac
done
if [ "${NNODES:-1}" = 2 ] && [ -n "$id" ]; then # torchrun: both machines meet
  meet="$MEETINGS/$id.$(ls "$MEETINGS" | grep -c "^$id.*node$NODE_RANK")"
  mkdir "$meet.node$NODE_RANK"
  tries=0
  until [ -e "$meet.node$((1 - NODE_RANK))" ]; do
    sleep
    tries=$((tries + 1))
    [ $tries -lt 400 ] || exit 7
  done
  [ "$NODE_RANK" = 0 ] || exit 0
fi
[ "$module" != chat_cli ] || cat >/dev/null
[ "$module" != "${KILL_BEFORE:-none}" ] || exit 1
case $module in
base_train | mid_train) run=${module%_train} ;;
chat_sft | chat_rl) run=${module#chat_} ;;
esac
if [ -n "$run" ]; then
  folder="$NANOCHAT_BASE_DIR/$run/$tag"
  [ -z "$fresh" ] || rm -rf "$folder"
  mkdir -p "$folder"
  echo started >>"$folder/starts"
fi
[ "$module" != "${KILL_IN:-none}" ] || exit 1
if [ -n "$run" ] && [ -n "$NUM_STEPS" ]; then # to be gone on with after a signal
  touch "$folder/steps"
  while [ "$(grep -c step "$folder/steps")" -lt "$NUM_STEPS" ]; do
    echo step >>"$folder/steps"
    sleep
  done
fi
[ -z "$run" ] || echo '{"step": 9}' >"$folder/result.json"
[ "$module" != "${STOP_IN:-none}" ] || { touch "$NANOCHAT_STOPPED" && exit "$STOP_STATUS"; }
"""


class Tier:
    """A copy of the shell scripts, and stand-ins for everything that they call."""

    def __init__(self, folder: Path, script: str):
        self.folder, self.script, self.base_dir = folder, script, folder / "base"
        self.tag = {"speedrun.sh": "d24", "run1000.sh": "d32", "runcpu.sh": "laptop-primer"}[script]
        for name in ("speedrun.sh", "run1000.sh", "runcpu.sh", "stages.sh"):
            shutil.copy(ROOT / name, folder)
        (folder / "setup.sh").touch()
        (folder / "meetings").mkdir()
        (folder / "bin").mkdir()
        sleep = '#!/bin/sh\nexec "$(PATH=/usr/bin:/bin command -v sleep)" 0.05\n'
        for name, text in (("python", STAND_IN), ("torchrun", STAND_IN), ("sleep", sleep)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def edit(self, old: str, new: str) -> None:
        """Replace the first `old` in a tier's script."""
        path = self.folder / ("runcpu.sh" if self.script == "runcpu.sh" else "speedrun.sh")
        before, after = path.read_text().split(old, 1)
        path.write_text(before + new + after)

    def add_flag(self, stage: str, flag: str) -> None:
        self.edit(f"scripts.{stage}", f"scripts.{stage} {flag}")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        calls = self.folder / f"calls{variables.get('NODE_RANK', '')}"
        calls.write_text("")
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
            "NANOCHAT_BASE_DIR": str(self.base_dir), "NPROC_PER_NODE": "8",
            "MEETINGS": str(self.folder / "meetings"), "MASTER_ADDR": "here",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", self.folder / self.script, *arguments], env=environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, *arguments: str, **variables: str) -> list[str]:
        """The stages that were run, in order. `KILL_IN`, `KILL_BEFORE`: the module that fails."""
        process = self.start(*arguments, **variables)
        log = process.communicate(timeout=60)[0]
        if "STOP_IN" in variables:
            assert process.returncode == 75 and "the time is up; the same command" in log, log
        else:
            fails = any(name.startswith("KILL") for name in variables)
            assert (process.returncode != 0) == fails, log
        return re.findall(r"^== (\w+): (?!done before|took|the time)", log, re.M)

    def num_starts(self, stage: str) -> int:
        """How often the stage's run was started since its folder was last cleared."""
        path = self.base_dir / TRAINERS[stage] / self.tag / "starts"
        return path.read_text().count("started") if path.exists() else 0


@pytest.fixture(params=["speedrun.sh", "runcpu.sh"])
def tier(tmp_path: Path, request: pytest.FixtureRequest) -> Tier:
    return Tier(tmp_path, request.param)


@pytest.mark.parametrize("tier", ["speedrun.sh", "run1000.sh", "runcpu.sh"], indirect=True)
@pytest.mark.parametrize("stage", TRAINERS)
def test_a_run_goes_on_with_every_flag_that_may_change(tier: Tier, stage: str) -> None:
    ran = tier.run(KILL_IN=stage)
    assert ran[-1] == stage
    flags = [f"--{setting}=1" for setting in sorted(FREE_SETTINGS - {"fresh"})]
    alone = (tier.script, stage) == ("speedrun.sh", "base_train")
    one_by_one = flags if alone else [" ".join(flags)]
    for number, flag in enumerate(one_by_one, start=2):
        tier.add_flag(stage, flag)
        assert tier.run(KILL_IN=stage, DEVICE_BATCH_SIZE=str(number), WANDB_RUN="me") == [stage]
        assert tier.num_starts(stage) == number
    rest = tier.run()
    assert rest[0] == stage and tier.num_starts(stage) == len(one_by_one) + 2
    assert not set(ran[:-1]) & set(rest)
    # Finished: the trainer is asked again, and says so; nothing else is run, nothing deleted.
    tier.add_flag(stage, "--log_every=7")
    assert tier.run() == [stage]
    assert tier.run(DEVICE_BATCH_SIZE="64") == []
    assert all(tier.num_starts(each) == 1 for each in TRAINERS if each != stage)


def test_another_tokenizer_starts_every_run_over_once(tier: Tier) -> None:
    tier.run()
    tier.edit("scripts.tok_train ", "scripts.tok_train --max_doc_chars=9 ")
    for stage in TRAINERS:
        tier.run(KILL_BEFORE=stage)  # before it could delete anything
        assert tier.num_starts(stage) == 1
        tier.run(KILL_IN=stage)
        assert tier.num_starts(stage) == 1
        tier.run(KILL_IN=stage)
        assert tier.num_starts(stage) == 2
    tier.run()
    assert [tier.num_starts(stage) for stage in TRAINERS] == [3, 3, 3, 3]
    assert tier.run() == []


@pytest.mark.parametrize("old", [False, True])
def test_a_tokenizer_that_is_trained_back_costs_nothing(tier: Tier, old: bool) -> None:
    """Another size, given by mistake and taken back; but a run that began on it is not done."""
    everything = tier.run()
    if old:
        make_old_markers(tier, everything)
    tier.edit("scripts.tok_train ", "scripts.tok_train --max_doc_chars=9 ")
    tier.run(KILL_IN="tok_train")
    tier.edit("--max_doc_chars=9 ", "")
    ran = tier.run()
    assert ran[0] == "tok_train" and (old or ran[1:] == [])
    calls = (tier.folder / "calls").read_text()
    assert "--fresh" not in calls
    if tier.script == "speedrun.sh":  # the corpus is its own, whatever was prepared since
        assert "nanochat.dataset -n 9" in calls[: calls.index("tok_train")]
    if not old:
        tier.edit("scripts.tok_train ", "scripts.tok_train --max_doc_chars=9 ")
        tier.run(KILL_IN="base_train")
        tier.edit("--max_doc_chars=9 ", "")
        assert "base_train" in tier.run()
        assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 1, 1, 1]


def test_fresh_starts_every_run_over_once(tier: Tier) -> None:
    everything = tier.run()
    assert tier.run("--fresh", KILL_BEFORE="mid_train")[-1] == "mid_train"
    tier.run(KILL_BEFORE="mid_train")
    tier.run(KILL_IN="mid_train")
    assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 1, 1, 1]
    rest = tier.run()
    assert rest == everything[everything.index("mid_train") :]
    assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 2, 1, 1]
    assert tier.run("--fresh") == everything


@pytest.mark.parametrize("status", ["75", "0"])  # of python, and of torchrun
def test_a_tier_whose_time_is_up_says_so_and_goes_on(tier: Tier, status: str) -> None:
    everything = []
    for stage in ("base_train", "chat_eval", "chat_rl"):
        everything += tier.run(STOP_IN=stage, STOP_STATUS=status)
        assert everything.pop().startswith(stage)
    assert everything + tier.run() == tier.run("--fresh")


ALLOCATION = 12  # steps until the warning
SLURM = {
    "srun": """#!/bin/bash
        for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
        for task in $tasks; do
          wait $task; status=$?
          [ $status -le ${worst:-0} ] || worst=$status
        done
        exit ${worst:-0}""",
    "scontrol": """#!/bin/sh
        case $1 in
        show) printf 'one\ntwo\n' ;;
        requeue) echo "$2" >>"$QUEUE" ;;
        esac""",
}


def descendants(pid: int) -> list[int]:
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    below = children.get(pid, [])
    return below + [each for child in below for each in descendants(child)]


def test_the_slurm_job_comes_back_until_the_run_is_done(tmp_path: Path) -> None:
    """The README's, under a scheduler that warns all processes of a step but the batch script."""
    text = (ROOT / "README.md").read_text()
    job = text[text.index("#!/bin/bash\n#SBATCH") :].split("```")[0]
    assert re.search(r"--time=\S+ --signal=USR1@300 --requeue", job)
    tier = Tier(tmp_path, "speedrun.sh")
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job").write_text(job.replace("/shared/nanochat", str(tier.base_dir)))
    queue = tmp_path / "queue"
    queue.write_text("17\n")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "NPROC_PER_NODE": "8", "MEETINGS": str(tmp_path / "meetings"), "QUEUE": str(queue),
        "SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "NUM_STEPS": "16",
        "SLURM_JOB_NODELIST": "one,two",
    }  # fmt: skip
    runs = [tier.base_dir / run / tier.tag / "steps" for run in TRAINERS.values()]

    def num_steps() -> int:
        return sum(run.read_text().count("step") for run in runs if run.exists())

    statuses: list[int] = []
    while queue.read_text() == "17\n":
        queue.write_text("")
        for meeting in (tmp_path / "meetings").iterdir():
            meeting.rmdir()
        process = subprocess.Popen(
            ["bash", tmp_path / "job"], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        enough = num_steps() + ALLOCATION
        while process.poll() is None and num_steps() < enough:
            time.sleep(0.02)
        for pid in descendants(process.pid)[1:]:  # of the tasks; the first is srun
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        log = process.communicate(timeout=60)[0]
        statuses.append(process.returncode)
        assert statuses[-1] in (0, 75), log
    assert statuses[-1] == 0 and statuses.count(75) == len(statuses) - 1 > 1
    assert [run.read_text().count("step") for run in runs] == [16] * 4


def test_what_was_trained_by_hand_is_kept(tier: Tier) -> None:
    for run in TRAINERS.values():
        (tier.base_dir / run / tier.tag).mkdir(parents=True)
        (tier.base_dir / run / tier.tag / "starts").write_text("started")
    tier.run()
    assert [tier.num_starts(stage) for stage in TRAINERS] == [2, 2, 2, 2]


def test_a_rehearsal_leaves_a_model_of_depth_2_alone(tmp_path: Path) -> None:
    tier = Tier(tmp_path, "speedrun.sh")
    tier.tag = "d2"
    tier.run(DEPTH="2")
    tier.run(NANOCHAT_TINY="1")
    assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 1, 1, 1]


def test_the_goals_are_runs_of_their_own(tmp_path: Path) -> None:
    """The default's depth 24 stays as it is; every trainer of GPT-2's goal has its tag."""
    tier = Tier(tmp_path, "speedrun.sh")
    everything = tier.run()
    assert tier.run(GOAL="gpt2") == everything and tier.run() == []
    calls = (tier.folder / "calls").read_text()
    assert "scripts.plan --goal=best" in calls
    tier.tag = "d24-gpt2"
    assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 1, 1, 1]
    began = (tier.base_dir / "done" / tier.tag / "base_train").read_text()
    assert "--model_tag=d24-gpt2" in began and "--fp8" in began


CUT = {  # what plan chose for so many hours -> how often it is in a stage's command
    "base_train": ["--depth=12", "--target_param_data_ratio=10.5", "--eval_tokens=6553600"],
    "base_loss": ["--eval_tokens=6553600"], "base_eval": ["--max_per_task=248"],
    "mid_train": ["--num_iterations=640", "--eval_tokens=6553600"],
    "chat_eval_mid": ["--max_problems=248"], "chat_eval_sft": ["--max_problems=248"],
    "chat_rl": ["--num_steps=62", "--eval_problems=248"], "chat_eval_rl": ["--max_problems=248"],
}  # fmt: skip


def test_hours_choose_every_size_once(tmp_path: Path) -> None:
    """Killed and started again where plan would choose otherwise; other hours are another run."""
    tier = Tier(tmp_path, "speedrun.sh")
    tier.tag, done = "0.5h", tier.base_dir / "done" / "0.5h"
    ran = tier.run(HOURS=".5", KILL_IN="mid_train")
    assert ran[-1] == "mid_train"
    assert tier.run(HOURS=".5", PLANNED_RATIO="3")[0] == "mid_train"
    assert [tier.num_starts(stage) for stage in TRAINERS] == [1, 2, 1, 1]
    for stage, flags in CUT.items():
        words = (done / stage).read_text().split()
        assert set(flags) <= set(words) and "--model_tag=0.5h" in words
        assert len({word.split("=")[0] for word in words}) == len(words)  # no flag twice
    assert "--fp8" not in (done / "base_train").read_text()
    everything = tier.run(HOURS="8")
    assert len(everything) == len(STAGES) and tier.run(HOURS="8") == []
    assert tier.run("--fresh", HOURS=".5", PLANNED_RATIO="3") == everything
    assert "--target_param_data_ratio=3 " in (done / "base_train").read_text()
    calls = (tier.folder / "calls").read_text()
    assert "scripts.plan --goal=best --hours=.5 --gpus=8 --only" in calls
    both = tier.start(HOURS="8", GOAL="gpt2")
    assert "error: give HOURS or GOAL" in both.communicate()[0] and both.returncode == 2


def test_a_rehearsal_of_hours_stays_tiny(tmp_path: Path) -> None:
    tier = Tier(tmp_path, "speedrun.sh")
    tier.run(HOURS="8", NANOCHAT_TINY="1")
    calls = (tier.folder / "calls").read_text()
    assert "--hours=8 --depth=2 --gpus=8 --gpu=h100" in calls
    commands = {name: (tier.base_dir / "done/tiny-8" / name).read_text() for name in STAGES}
    assert "--num_iterations=12" in commands["base_train"]
    assert "--num_iterations=6 " in commands["mid_train"] and "640" not in commands["mid_train"]
    assert "--max_problems=4" in commands["chat_eval_rl"] and "62" not in commands["chat_rl"]


def make_old_markers(tier: Tier, stages: list[str]) -> None:
    """Give stages the markers of earlier versions: a random token, on which the next one builds."""
    token = ""
    for number, stage in enumerate(stages):
        marker = tier.base_dir / "done" / tier.tag / stage
        command = marker.read_text().splitlines()[0].split(" ", 1)[1]
        marker.with_suffix(".began").write_text(f"{token} {command}\n")
        marker.write_text(f"{token} {command}\n1764000000.{number}\n")
        token = f"1764000000.{number}"


MAKERS = {
    "runcpu.sh": [
        "python -m nanochat.dataset --corpus primer",
        "python -m scripts.tok_train --data=primer --vocab_size=2048 --max_chars=20000000",
    ],
    "speedrun.sh": ["python -m scripts.tok_train --vocab_size=32768 --max_chars=2000000000"],
}


@pytest.mark.parametrize("stage", ["base_train", "mid_train"])
def test_a_run_begun_by_an_earlier_version_goes_on(tier: Tier, stage: str) -> None:
    everything = tier.run()
    done = tier.base_dir / "done" / tier.tag
    made = "".join((done / name).read_text() for name in everything[:2])
    assert all(f" {command}\n" in made for command in MAKERS[tier.script])
    make_old_markers(tier, everything)
    assert tier.run() == []
    # Under way in `stage`, with flags that may change.
    rest = everything[everything.index(stage) :]
    for name in rest:
        (done / name).unlink()
        if name != stage:
            (done / f"{name}.began").unlink()
    tier.add_flag(stage, "--log_every=7")
    assert tier.run(DEVICE_BATCH_SIZE="2") == rest
    assert [tier.num_starts(each) for each in TRAINERS] == [1 + (each in rest) for each in TRAINERS]


@pytest.mark.parametrize("old", [False, True])
def test_evaluations_and_shards_start_no_run_over(tier: Tier, old: bool) -> None:
    everything = tier.run()
    if old:
        make_old_markers(tier, everything)
    tier.add_flag("tok_eval", "--seed=1")
    tier.add_flag("base_eval", "--seed=1")
    changed = ["tok_eval", "base_eval"]
    if tier.script == "speedrun.sh":
        tier.edit('all_shards python -m nanochat.dataset -n "$shards"', "all_shards true")
        changed.insert(1, "all_shards")
    ran = tier.run()
    assert ran == everything[everything.index("tok_eval") :] if old else ran == changed
    assert "--fresh" not in (tier.folder / "calls").read_text()


@pytest.mark.parametrize(("first", "hours"), [(0, ""), (1, ""), (1, "8")])
def test_two_machines_run_the_same_stages(tmp_path: Path, first: int, hours: str) -> None:
    """Whichever starts first, with flags that may differ, and though machine 0 starts over."""
    tier = Tier(tmp_path, "speedrun.sh")
    for arguments in ([], ["--fresh"]):
        for meeting in (tmp_path / "meetings").iterdir():
            meeting.rmdir()
        processes = []
        for node in (first, 1 - first):
            variables = {"NNODES": "2", "NODE_RANK": str(node), "DEVICE_BATCH_SIZE": str(4 + node)}
            variables |= {"HOURS": hours, "PLANNED_RATIO": str(5 + node)}  # machine 0 chooses
            processes.append(tier.start(*arguments, **variables))
            time.sleep(0.5)
        try:
            logs = [process.communicate(timeout=30)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], logs
        calls = [(tmp_path / f"calls{node}").read_text() for node in (0, 1)]
        assert not hours or all("--target_param_data_ratio=5 " in text for text in calls)
        modules = [re.findall(r"^.*--rdzv_id=(\S+)", text, re.M) for text in calls]
        assert modules[0] == modules[1] and len(modules[0]) == 10
        assert [len(re.findall("--fresh", text)) for text in calls] == [4 * bool(arguments)] * 2


def shard(first: int) -> bytes:
    return parquet(*(primer.document("train", index) for index in range(first, first + 300)))


def write_datasets(folder: Path) -> None:
    """A few rows of every data set that the default mixtures and ChatCORE read."""
    rows = DATASETS | {"openai/openai_humaneval/openai_humaneval": ("test", ROW, 1)}
    for name, (splits, row, _) in rows.items():
        (folder / name).mkdir(parents=True)
        for split in splits.split():
            (folder / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 20)


@pytest.fixture
def environment(tmp_path: Path):
    """What speedrun.sh runs in: nothing of ours outside `tmp_path`, and a hub on this machine."""
    write_datasets(tmp_path / "datasets")
    write_bundle(tmp_path / "bundle")
    # A working folder of its own, since the report is copied there.
    (tmp_path / "nanochat").mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("report."):
            (tmp_path / "nanochat" / entry.name).symlink_to(entry)
    files = {f"shard_{i:05d}.parquet": shard(300 * i) for i in (0, 1, 2)}
    files["shard_06542.parquet"] = shard(1000)
    # Every third answer is an error, cut short, or of a wrong length.
    hub = Hub("karpathy/climbmix-400b-shuffle", files, lambda number: FAULTS.get(number % 9, ""))
    folders = {"BASE_DIR": "base", "DATASETS": "datasets", "EVAL_BUNDLE": "bundle"}
    variables = {f"NANOCHAT_{name}": str(tmp_path / folder) for name, folder in folders.items()}
    variables |= {"NANOCHAT_TINY": "1", "NPROC_PER_NODE": "2", "HF_ENDPOINT": hub.address}
    with hub.serving():
        yield os.environ | variables | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def left_over(environment: dict[str, str]) -> list[int]:
    """The processes that still run in `environment`."""
    own, found = f"NANOCHAT_BASE_DIR={environment['NANOCHAT_BASE_DIR']}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if own in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def run(
    environment: dict[str, str], log: Path, stop_in: str = "", number: int = signal.SIGKILL
) -> None:
    """Run speedrun.sh to its end, or signal all its processes soon after stage `stop_in` began."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", log.parent / "nanochat" / "speedrun.sh"], env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if stop_in and f"== {stop_in}: " in log.read_text():
                time.sleep(random.Random(stop_in).uniform(0, 12))
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                for pid in left_over(environment) if number != signal.SIGKILL else ():
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                status = process.wait()
                assert number == signal.SIGKILL or status == 75, log.read_text()[-3000:]
                deadline = time.monotonic() + 30
                while (orphans := left_over(environment)) and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert not orphans
                return
            time.sleep(0.1)
    assert process.returncode == 0, log.read_text()[-3000:]


@pytest.mark.long
def test_from_nothing_to_a_report_though_killed_in_every_stage(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for number, stage in enumerate(STAGES):
        flags = {"DEVICE_BATCH_SIZE": str(1 + number % 2)}
        how = signal.SIGUSR1 if number % 3 == 0 else signal.SIGKILL
        run(environment | flags, tmp_path / f"{stage}.log", stage, how)
        assert not re.search("^== .*--fresh", (tmp_path / f"{stage}.log").read_text(), re.M)
    run(environment, tmp_path / "end.log")
    log = (tmp_path / "end.log").read_text()
    assert re.findall(r"== (\w+): done before", log) == STAGES[: log.count("done before")]
    assert log.count("done before") >= len(STAGES) - 1
    report = json.loads((tmp_path / "base" / "report" / "report.json").read_text())
    assert set(STAGES) - {"all_shards"} <= set(report["sections"])
    assert (tmp_path / "nanochat" / "report.md").read_text().startswith("# nanochat report")
    again = tmp_path / "again.log"
    run(environment, again)
    assert again.read_text().count("done before") == len(STAGES)


def test_the_shell_scripts_know_their_options() -> None:
    for command, said in {
        "runcpu.sh --help": "bash runcpu.sh --from FOLDER",
        "runcpu.sh --from": "error: --from needs a value\n",
        "runcpu.sh --fresh --from=": "error: --from needs a value\n",
        "runcpu.sh --from=/nowhere": "error: --from /nowhere is no folder\n",
        "runcpu.sh --minutes": "error: --minutes needs a value\n",
        "runcpu.sh --form": "error: unknown option --form;",
        "speedrun.sh --frehs": "error: unknown option --frehs; use --fresh, --custom",
        "run1000.sh 8": "error: unknown option 8; use --fresh, --custom",
    }.items():
        done = subprocess.run(f"bash {command}".split(), cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout + done.stderr
        assert done.returncode == (0 if command.endswith("--help") else 2)
