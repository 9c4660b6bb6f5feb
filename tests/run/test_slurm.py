"""The batch scripts on a real Slurm of two virtual nodes, set up here: interrupted in every stage == uninterrupted.

It needs Slurm's and munge's programs, but neither root nor a Slurm that runs; one that does is left alone.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_pl.cli import main
from distill_pl.measure.paper import TABLE_2

REPOSITORY = Path(__file__).parents[2]
SYSTEM = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])  # where daemons are, and many a PATH is not
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=SYSTEM)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
STEP = 4 * 32  # tokens of one step
STAGES = ["1_matrix_mixing", "2_hidden_align", "3_kd"]
STEPS = 300  # of a stage: seconds, long enough to be interrupted in
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


class Slurm:
    """A cluster of two nodes on this machine, everything of which lies in `home`."""

    def __init__(self, home: Path):
        self.home = home
        ours = {  # a job that these tests may themselves be part of is none of its business
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN", "MASTER_"))
        }
        self.env = ours | {
            "SLURM_CONF": str(home / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), SYSTEM]),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",  # n1 and n2 are no names of machines
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        with ExitStack() as stack:
            stack.callback(self.stop)
            self.start()
            stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(home=self.home, ports=ports, host=host, user=getpass.getuser())
        (self.home / "slurm.conf").write_text(conf)
        (self.home / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # its files must exist
        for folder in ("state", "spool-n1", "spool-n2"):
            (self.home / folder).mkdir()
        key = self.home / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={self.home}/munge.{name}" for name in ("pid", "log", "seed")]
        # --force: else it insists on a folder that all users may enter
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.home}/munge.socket", *files)
        wait_for((self.home / "munge.socket").exists, "munged")
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D", "-N", "n1")
        self.daemon("slurmd", "-D", "-N", "n2")
        wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", "two idle nodes")

    def daemon(self, *command: str) -> None:
        with open(self.home / "daemons.log", "a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, cwd=self.home, stdout=log, stderr=log))

    def stop(self) -> None:
        """Ends the jobs, then the daemons, then whatever of a job is still there: all that runs with our slurm.conf."""
        if len(self.daemons) > 1:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + 30
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Those that were started for this cluster."""
        mark, found = f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:  # another user's, or gone meanwhile
                continue
        return found

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, cwd=self.home, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> str:
        """`sbatch` -> the job's id."""
        return self.run("sbatch", "--parsable", *words).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def finished(self, job: str) -> dict[str, str]:
        """Waits for the end of a job."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        wait_for(lambda: self.job(job)["JobState"] in over, f"end of job {job}", seconds=180)
        return self.job(job)

    def requeued(self, job: str, times: int) -> None:
        """Waits until a job has been stopped and waits for its next start."""
        wanted = {"JobState": "PENDING", "Restarts": str(times)}
        wait_for(lambda: wanted.items() <= self.job(job).items(), f"requeue {times} of job {job}", seconds=60)

    def start_again(self, job: str) -> None:
        """Starts a requeued job without Slurm's pause of two minutes."""
        time.sleep(3)  # in the second in which a job was killed, slurmd takes its new start for the killed one
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for(lambda: self.job(job)["JobState"] == "RUNNING", f"start of job {job}", seconds=60)


def wait_for(condition, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster; jobs are submitted from a folder that has the repository's `configs` and `experiments`."""
    home = tmp_path_factory.mktemp("slurm")
    for name in ("configs", "experiments"):
        (home / name).symlink_to(REPOSITORY / name)
    cluster = Slurm(home)
    with cluster:
        yield cluster
    assert not cluster.processes()


@pytest.fixture(scope="module")
def options(teacher_folder, corpus, tmp_path_factory):
    """`options(**keys)` -> arguments of a small run, with a checkpoint every eight steps."""
    keys = {
        "teacher": teacher_folder, "data.dataset": corpus, "data.name": None, "data.cache": tmp_path_factory.mktemp("cache"),
        "data.sequence_length": 32, "data.batch_size": 4, "data.validation_tokens": 256, "data.repeat": "true",
        "trainer.accelerator": "cpu", "checkpoint_every": 8 * STEP, "tokens": STEPS * STEP,
    }  # fmt: skip
    return lambda **more: [f"--{key}={value}" for key, value in (keys | more).items() if value is not None]


@pytest.fixture(scope="module")
def three_stages(options):
    each = STEPS * STEP
    return lambda out: options(out=out, tokens=3 * each, **{"matrix_mixing.tokens": each, "hidden_align.tokens": each})


TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "configs/slurm/fit.sbatch"]


@pytest.fixture(scope="module")
def uninterrupted(slurm, three_stages):
    """The run folder of a job on two nodes."""
    job = slurm.finished(slurm.submit("--output=whole.out", *TWO_NODES, *three_stages("whole")))
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "0", "2")
    return slurm.home / "whole"


def assert_same(ours: Path, theirs: Path) -> None:
    ours, theirs = (load_file(out / "student" / "model.safetensors") for out in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def saved_step(stage: Path) -> int:
    """Of its checkpoint; 0 where there is none."""
    checkpoint = stage / "last.ckpt"
    return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else 0


def requeue(slurm: Slurm, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


def warn(slurm: Slurm, job: str) -> None:
    """The signal that comes two minutes before the time is up."""
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def preempt(slurm: Slurm, job: str) -> None:
    """A more urgent job needs both nodes."""
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "--gpus-per-node=2", "true")


def test_interrupted_in_every_stage_equals_uninterrupted(slurm, three_stages, uninterrupted):
    job = slurm.submit("--output=interrupted.out", *TWO_NODES, *three_stages("interrupted"))
    out = slurm.home / "interrupted"
    for times, (stage, interrupt) in enumerate(zip(STAGES, (requeue, warn, preempt), strict=True), start=1):
        wait_for(lambda folder=out / stage: saved_step(folder) > STEPS // 4, f"a checkpoint of {stage}", seconds=90)
        interrupt(slurm, job)
        slurm.requeued(job, times)
        print(f"{interrupt.__name__} in {stage}: goes on from step {saved_step(out / stage)} of {STEPS}")
        assert 0 < saved_step(out / stage) < STEPS and not (out / stage / "student.safetensors").exists()
        slurm.start_again(job)
    job = slurm.finished(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "3")
    assert_same(out, uninterrupted)
    assert not list(out.rglob("*.new")) and not list(out.rglob("*.ckpt"))
    said = (slurm.home / "interrupted.out").read_text()
    assert said.count("was stopped at step") == said.count("resumed at step") == 3 and "Traceback" not in said


def test_nodes_do_not_matter(slurm, three_stages, uninterrupted):
    two_tasks = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "configs/slurm/fit.sbatch"]
    job = slurm.finished(slurm.submit("--output=one_node.out", *two_tasks, *three_stages("one_node")))
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "1")
    assert_same(slurm.home / "one_node", uninterrupted)


def test_bad_input_fails_once(slurm, three_stages):
    bad = [*three_stages("bad"), "--data.batch_size=3"]
    job = slurm.finished(slurm.submit("--output=bad.out", *TWO_NODES, *bad))
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    said = (slurm.home / "bad.out").read_text().splitlines()
    assert any("Exited with exit code 2" in line for line in said)
    lines = [line for line in said if not line.startswith(("srun: ", "slurmstepd"))]
    assert len(lines) == 1 and lines[0].startswith("distill-pl: data.batch_size 3 is not divisible by the 2 ranks"), lines


def test_table_2(slurm, options, tmp_path, monkeypatch):
    """Two of its twenty tasks at once; the one that has the array's own id is interrupted, the other goes on."""
    script = REPOSITORY / "configs" / "slurm" / "table2.sbatch"
    prefix = re.search(r"grep -l '(.*)'", script.read_text())[1]
    names = [file.stem for file in sorted(REPOSITORY.glob("experiments/*.yaml")) if re.match(prefix, file.read_text())]
    assert sorted(names) == sorted(TABLE_2) and f"--array=0-{len(names) - 1}\n" in script.read_text()

    tasks = {name: names.index(name) for name in ("gla", "retnet")}
    indices = ",".join(map(str, tasks.values()))
    keys = options(**{"data.cache": slurm.home / "cache"})  # a new one, which both want to fill
    array = slurm.submit(f"--array={indices}", "--output=table2-%a.out", "configs/slurm/table2.sbatch", *keys)
    for name in tasks:
        wait_for(lambda folder=slurm.home / "runs" / name / "3_kd": saved_step(folder) > 0, f"start of {name}", seconds=90)
    jobs = {name: f"{array}_{task}" for name, task in tasks.items()}
    last, other = sorted(jobs, key=lambda name: slurm.job(jobs[name])["JobId"] != array)
    assert slurm.job(jobs[last])["JobId"] == array
    warn(slurm, jobs[last])
    slurm.requeued(jobs[last], 1)
    slurm.start_again(jobs[last])
    ends = {name: slurm.finished(job) for name, job in jobs.items()}
    assert [end["JobState"] for end in ends.values()] == ["COMPLETED"] * 2
    assert (ends[last]["Restarts"], ends[other]["Restarts"]) == ("1", "0")

    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(REPOSITORY / "experiments" / f"{last}.yaml"), *keys])
    assert_same(slurm.home / "runs" / last, tmp_path / "runs" / last)
