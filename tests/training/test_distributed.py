"""Two and three real processes: what they train is what one trains, and what some save the others continue."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from common.foundation.files import read_json
from common.training.distributed import World, inner, spread
from common.training.snapshots import Snapshots, whole_tensors
from tests.training import ranks
from tests.training.ranks import ACCUMULATE, RESUMED, ROWS, RUNS, STEPS
from tests.training.tiny import CONFIG, Ragged, Words, stream_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")


def torchrun(processes, task, folder, restarts=0):
    """What each process wrote, by rank."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        "-m", "tests.training.ranks", task, str(folder),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # torch 2.13 keeps its store over a restart, and with it the addresses of the dead: now and then one connects there.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    run = subprocess.Popen(
        command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        said = run.communicate(timeout=2400)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # its children, too
        raise
    assert run.returncode == 0, said[-4000:]
    return [read_json(folder / f"{task}-{rank}-of-{processes}.json") for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Everything that two processes do, in one start and one restart, by the first worker that needs it."""
    try:
        (folder / "begun").mkdir()
    except FileExistsError:
        while not (folder / "ended").exists():
            time.sleep(0.1)
        return [read_json(folder / f"two-{rank}-of-2.json") for rank in range(2)]
    try:
        return torchrun(2, "two", folder, restarts=1)
    finally:
        (folder / "ended").mkdir()


@pytest.fixture(scope="module")
def alone():
    """The same trainings in this process: name -> trainer, at the end."""
    return {name: ranks.trainer(name, None).train() for name in RUNS}


def assert_rows(found, expected):
    """Losses, norms, bits per byte within 1e-5; the rest exactly."""
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, STEPS + 1))
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-5), "what is logged, over all processes"
        for key, value in other.items():
            close = pytest.approx(value, rel=1e-5 if key != "gradient_norm" else 1e-4)
            assert row[key] == (close if isinstance(value, float) else value), (row["step"], key)


def test_masks_are_ragged_over_processes_and_batches():
    streams = [stream_of(ROWS // 2, rank=rank, world_size=2) for rank in range(2)]
    counts = [
        int(Ragged().prepare(s.next_batch(), 0).batch.loss_mask.sum())
        for _ in range(STEPS * ACCUMULATE)
        for s in streams
    ]
    assert 0 in counts, "one process has nothing to say"
    assert len(set(counts)) > 5


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_twice_the_rows(two, alone, folder, name):
    for rank in range(2):
        assert_rows(two[rank][name]["rows"], alone[name].history)
        evaluations = [row["logit"] for row in two[rank][name]["evaluations"]]
        unique = {row["step"]: row["logit"] for row in alone[name].evaluations}
        assert evaluations == pytest.approx(list(unique.values()), rel=1e-3, abs=1e-3)
    assert two[0][name]["rows"] == two[1][name]["rows"], "both know the whole"


@pytest.mark.parametrize("name", RUNS)
def test_whole_tensors_are_those_of_one_process(two, alone, folder, name):
    whole = safetensors.torch.load_file(folder / f"{name}.safetensors")
    single = whole_tensors(alone[name].model)
    start = whole_tensors(ranks.trainer(name, None).model)
    assert whole.keys() == single.keys()
    for key in whole:
        assert whole[key].shape == single[key].shape
        assert (whole[key] - single[key]).norm() < 1e-3 * (single[key] - start[key]).norm(), key


@pytest.mark.parametrize("name", RUNS)
def test_nan_in_one_process_stops_all_and_is_named(two, name):
    said = [two[rank][f"nan-{name}"] for rank in range(2)]
    assert all(one["same"] and "update 1: loss nan" in one["error"] for one in said)
    assert "batches 4 to 7" in said[0]["error"]
    assert "in another process" in said[0]["error"]
    assert "first in the output of blocks.1.attention;" in said[1]["error"]


def test_processes_that_share_nothing_are_refused(two):
    assert "2 processes would train 2 models" in two[0]["none"]
    with pytest.raises(ValueError, match="parallel data needs processes: start with torchrun"):
        World().wrap(nn.Linear(1, 1), "data")


def test_a_killed_process_is_started_again_and_goes_on(two, alone):
    for found in two:
        assert found["killed"]["first"] is False
        assert found["killed"]["resumed"]
        assert found["killed"]["from"] == 2
        assert_rows(found["killed"]["rows"], alone["shards-muon"].history)


@pytest.mark.parametrize("name", RUNS)
def test_one_process_without_torchrun_continues(two, alone, folder, tmp_path, name):
    shutil.copytree(folder / name, tmp_path / name)
    training = ranks.trainer(name, None, tmp_path / name)
    assert training.resume()
    assert training.done == 3
    assert_rows(training.train().history, alone[name].history)
    stream, counted = training.stream.state_dict(), training._drawn
    assert (stream["consumed"], counted) == (STEPS * ACCUMULATE * ROWS, 2 * 3 * ACCUMULATE + 3 * ACCUMULATE)


def test_one_process_of_torchrun_continues(two, alone, folder, monkeypatch):
    """In this process, with the environment that `torchrun --nproc-per-node 1` makes: a start costs five seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    made = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for key, value in made.items():
        monkeypatch.setenv(key, str(value))
    for name in RESUMED:
        shutil.copytree(folder / name, folder / f"{name}-on-1")
    with World.joined() as world:
        assert (world.rank, world.size) == (0, 1)
        found = ranks.resume(world, folder)
    assert not torch.distributed.is_initialized()
    for name in RESUMED:
        assert found[name]["resumed"]
        assert found[name]["from"] == 3
        assert_rows(found[name]["rows"], alone[name].history)


def test_three_processes_continue_what_two_saved(two, alone, folder):
    for name in RESUMED:
        shutil.copytree(folder / name, folder / f"{name}-on-3")
    for found in torchrun(3, "resume", folder):
        for name in RESUMED:
            assert found[name]["resumed"]
            assert found[name]["from"] == 3
            assert_rows(found[name]["rows"], alone[name].history)


def test_another_optimizer_is_refused_for_shards(two, folder):
    """torch's own error for that is no Exception."""
    training = ranks.trainer("data-muon", None, folder / "shards-adamw")  # the same model
    assert RUNS["data-muon"][2] == RUNS["shards-adamw"][2] == CONFIG
    before = whole_tensors(training.model)["embedding.weight"].clone()
    with pytest.raises(ValueError, match=r"/first is \(16, 16\) in the snapshot and missing here"):
        training.resume()
    assert torch.equal(whole_tensors(training.model)["embedding.weight"], before)


def test_another_tokenizer_is_refused_for_shards(two, folder):
    training = ranks.trainer("shards-adamw", None, folder / "shards-adamw")
    training.tokenizer = Words("other words")
    with pytest.raises(ValueError, match="tokenizer words, 31 of….*other words"):
        training.resume()
    assert training.done == 0


def test_a_snapshot_of_shards_is_checked_as_a_whole(two, folder, tmp_path):
    shutil.copytree(folder / "shards-adamw", tmp_path / "s")
    training = ranks.trainer("shards-adamw", None, tmp_path / "s")
    part = next((Snapshots(tmp_path / "s").all()[0] / "shards").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="passed over"):
        assert not training.resume()


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.joined() as world:
        assert world == World(0, 1, "cpu")
    value = torch.tensor(3.0)
    assert world.sum(value) is value
    model = nn.Linear(2, 2)
    assert world.wrap(model, "none") is model


def test_inner_is_inside_of_every_wrapper(monkeypatch):
    """DistributedDataParallel and torch.compile, in either order."""
    model = nn.Linear(2, 2)

    class Wrapped(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    compiled = nn.Module()
    compiled._orig_mod = Wrapped(model)
    other = nn.Module()
    other._orig_mod = model
    assert inner(model) is inner(compiled) is inner(Wrapped(other)) is model


def test_what_spread_raises_says_where_it_came_from(tmp_path):
    """And the process that would wait for ever has been stopped."""
    with pytest.raises(ProcessException, match="spread_works(.|\n)*rank 1 has had enough") as caught:
        spread(ranks.spread_works, 2, tmp_path, True)
    assert "Traceback" in str(caught.value)
    assert not alive(int((tmp_path / "0").read_text()))


def test_spread_gives_each_its_rank_and_a_thread(tmp_path):
    spread(ranks.spread_works, 2, tmp_path, False)
    assert [read_json(tmp_path / f"{rank}.json") for rank in range(2)] == [[rank, 2, 1, 3.0] for rank in range(2)]


def test_a_killed_parent_takes_its_processes_along(tmp_path):
    code = f"from tests.training import ranks; ranks.spread_for_ever({str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        members = [int(wait_for(tmp_path / str(rank))) for rank in range(2)]
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, members)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, members))


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.read_text()


def alive(pid):
    """A dead child that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
