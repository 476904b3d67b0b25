"""Checkpoints: any number of stages reads any other's, a kill leaves the last good one, damage is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import warnings
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import PeerLost, UserError
from pipeline.train import checkpoint


def model() -> nn.Module:
    """Four small blocks with BatchNorm, whose first and last weights are tied."""
    torch.manual_seed(0)
    blocks = nn.ModuleDict({f"block{n}": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for n in range(4)})
    blocks["block3"][0].weight = blocks["block0"][0].weight
    blocks.train()
    for block in blocks.values():
        block(torch.randn(5, 6))
    return blocks


def state(stages: int, stage: int) -> dict[str, Tensor]:
    """What one of `stages` stages saves: its blocks' weights, buffers and a momentum per parameter."""
    each = 4 // stages
    mine = [f"block{n}" for n in range(stage * each, (stage + 1) * each)]
    full = {name: tensor for name, tensor in model().state_dict().items() if name.split(".")[0] in mine}
    momentum = {f"optim.{name}.momentum": tensor * 2 for name, tensor in full.items() if tensor.is_floating_point()}
    return {**{f"model.{name}": tensor for name, tensor in full.items()}, **momentum}


def empty_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}


def assert_loads(folder: Path, expected: dict[str, Tensor]) -> None:
    loaded = empty_like(expected)
    checkpoint.load(folder, loaded)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def save_one(directory: Path, step: int, *, keep: int = 3, size: int = 8) -> Path:
    """One process's checkpoint, whose every number is its step."""
    tensors = {"model.w": torch.full((size,), float(step)), "optim.w.step": torch.tensor(float(step))}
    return checkpoint.save(directory, step, tensors=tensors, values={"update": step}, keep=keep)


def assert_is_step(folder: Path, step: int) -> None:
    assert checkpoint.read_values(folder) == {"update": step, "step": step}
    assert_loads(folder, {"model.w": torch.full((8,), float(step)), "optim.w.step": torch.tensor(float(step))})


# Processes that save together, over Gloo. The fork server imports torch once.


def context() -> ForkServerContext:
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["torch.distributed.checkpoint.state_dict_saver", "pipeline.train.checkpoint"])
    return forkserver


def join_gloo(store: Path, rank: int, size: int) -> dist.ProcessGroup:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    return dist.new_group(list(range(size)))


def forget_how_to_send_pickles() -> None:
    """Objects that torch sends are pickles: whoever uses such a function from here on fails."""
    names = [name for name in dir(dist) if "object" in name]
    assert {"all_gather_object", "broadcast_object_list"} <= set(names)
    for name in names:
        delattr(dist, name)


def save_a_stage(store: Path, directory: Path, rank: int, size: int, conn) -> None:
    group = join_gloo(store, rank, size)
    forget_how_to_send_pickles()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folder = checkpoint.save(
                directory, 7, tensors=state(size, rank), values={"rank": rank, "lr": 0.1}, group=group
            )
        conn.send(str(folder))
    except (UserError, PeerLost) as error:
        conn.send(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def save_for_ever(store: Path, directory: Path, rank: int, size: int, conn) -> None:
    group = join_gloo(store, rank, size) if size > 1 else None
    for step in range(1, 10_000):
        tensors = {f"model.w{rank}": torch.full((20_000,), float(step))}
        checkpoint.save(directory, step, tensors=tensors, values={"update": step}, keep=2, group=group)
        if step == 1:
            conn.send("going")


def start(target, tmp_path: Path, directory: Path, size: int) -> list:
    """(process, connection) of each of `size` ranks."""
    store = tmp_path / f"store{random.getrandbits(64):x}"
    ranks = []
    for rank in range(size):
        mine, theirs = multiprocessing.Pipe()
        process = context().Process(target=target, args=(store, directory, rank, size, theirs))
        process.start()
        ranks.append((process, mine))
    return ranks


def replies(ranks: list) -> list[str]:
    got = []
    for process, conn in ranks:
        assert conn.poll(60), "a rank says nothing"
        got.append(conn.recv())
        process.join(30)
        assert process.exitcode == 0
    return got


@pytest.mark.parametrize("writers", [4, 2])
def test_a_checkpoint_of_many_stages_is_read_by_two_and_by_one(tmp_path: Path, writers: int) -> None:
    folders = replies(start(save_a_stage, tmp_path, tmp_path / "c", writers))
    folder = checkpoint.latest(tmp_path / "c")
    assert folders == [str(folder)] * writers and folder.name == "step-00000007"
    for readers in (1, 2, 4):
        for stage in range(readers):
            assert_loads(folder, state(readers, stage))
    assert checkpoint.read_values(folder) == {"rank": 0, "lr": 0.1, "step": 7}
    assert len(list(folder.glob("*.distcp"))) == writers


def test_a_checkpoint_of_one_stage_is_read_by_four(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, tensors=state(1, 0), values={})
    for stage in range(4):
        assert_loads(folder, state(4, stage))
    shapes = checkpoint.read_shapes(folder)
    assert shapes["model.block3.0.weight"] == (6, 6) and shapes["model.block0.1.num_batches_tracked"] == ()


def test_parameters_in_a_flat_buffer_and_of_any_type_and_format_come_back(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    tensors = {
        "view": nn.Parameter(flat[4:16].view(3, 4)),
        "half": torch.arange(4).to(torch.bfloat16),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "bytes": torch.get_rng_state(),
        "empty": torch.empty(0),
    }
    folder = checkpoint.save(tmp_path, 1, tensors=tensors, values={})
    assert_loads(folder, {name: tensor.detach() for name, tensor in tensors.items()})
    target = nn.Parameter(torch.zeros(24)[12:].view(3, 4))
    checkpoint.load(folder, {"view": target})
    assert torch.equal(target, tensors["view"]) and target.requires_grad
    checkpoint.load(folder, {})
    assert (folder / "__0_0.distcp").stat().st_size < 50_000


def test_the_newest_is_pointed_at_and_the_last_k_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        save_one(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert_is_step(checkpoint.latest(tmp_path), 100)
    assert checkpoint.latest(tmp_path / "step-00000010") == tmp_path / "step-00000010"


def test_a_step_written_again_never_leaves_a_moment_without_it(tmp_path: Path) -> None:
    save_one(tmp_path, 5, keep=1)
    again = save_one(tmp_path, 5, keep=1)
    assert again.name == "step-00000005-2" and checkpoint.latest(tmp_path) == again
    save_one(tmp_path, 6, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000006"]


def test_going_on_from_an_older_checkpoint_keeps_what_is_pointed_at(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_one(tmp_path, step)
    save_one(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000002-2"
    assert_is_step(checkpoint.latest(tmp_path), 2)


def test_without_a_pointer_the_folders_tell(tmp_path: Path) -> None:
    save_one(tmp_path, 3)
    for damage in (None, b"", b"step-00000009", b"\xff\xfe", b"../elsewhere"):
        (tmp_path / "latest").unlink() if damage is None else (tmp_path / "latest").write_bytes(damage)
        assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_an_unfinished_folder_is_not_read_and_goes_at_the_next_save(tmp_path: Path) -> None:
    unfinished = tmp_path / ".step-00000009.tmp-0123456789abcdef"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.find_latest(tmp_path) is None
    save_one(tmp_path, 1)
    assert not unfinished.exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_kill_at_any_moment_leaves_the_last_good_one(tmp_path: Path, size: int) -> None:
    rng = random.Random(size)
    unfinished = 0
    for kill in range(10 if size == 1 else 4):
        directory = tmp_path / f"c{kill}"
        ranks = start(save_for_ever, tmp_path, directory, size)
        assert all(conn.poll(60) and conn.recv() == "going" for _, conn in ranks)
        deadline = monotonic() + rng.uniform(0, 0.1)
        while monotonic() < deadline:
            sleep(0.001)
        for process, _ in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process, _ in ranks:
            process.join(30)
        unfinished += any(path.name.startswith(".step-") for path in directory.iterdir())
        folder = checkpoint.latest(directory)
        step = checkpoint.read_values(folder)["update"]
        assert_loads(folder, {f"model.w{rank}": torch.full((20_000,), float(step)) for rank in range(size)})
        assert step >= 1 and folder.name == f"step-{step:08d}"
        save_one(directory, step + 1)
        assert_is_step(checkpoint.latest(directory), step + 1)
    assert unfinished, "no kill came in the middle of a save: the test shows nothing"


def mistake(folder: Path, wanted: dict[str, Tensor]) -> str:
    with pytest.raises(UserError) as raised:
        checkpoint.load(folder, wanted)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_missing_folder_or_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume .*/none: there is no such folder"):
        checkpoint.latest(tmp_path / "none")
    with pytest.raises(UserError, match="there is no complete checkpoint in it"):
        checkpoint.latest(tmp_path)
    assert checkpoint.find_latest(tmp_path / "none") is None
    assert "checkpoint.json cannot be read (No such file" in mistake(tmp_path, {"w": torch.zeros(1)})


def test_a_missing_parameter_or_another_shape_is_named(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 1)
    assert "optim.w.exp_avg is not in it" in mistake(folder, {"optim.w.exp_avg": torch.zeros(8)})
    wrong = mistake(folder, {"model.w": torch.zeros(2, 4)})
    assert "model.w has shape (8,), this run needs (2, 4)" in wrong


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed", "emptied"])
def test_a_damaged_file_is_named_with_another_to_resume_from(tmp_path: Path, name: str, damage: str) -> None:
    save_one(tmp_path, 1)
    folder = save_one(tmp_path, 2)
    path = folder / name
    content = path.read_bytes()
    changed = {
        "flipped": content[:20] + bytes([content[20] ^ 0xFF]) + content[21:],
        "truncated": content[:-10],
        "emptied": b"",
    }
    path.unlink() if damage == "removed" else path.write_bytes(changed[damage])
    wrong = mistake(folder, {"model.w": torch.zeros(8)})
    assert name in wrong and ("is damaged" in wrong or "cannot be read" in wrong)
    if name != "checkpoint.json" or damage != "removed":
        assert "--resume" in wrong and "step-00000001 instead" in wrong


def test_a_flipped_bit_in_a_weight_does_not_pass_for_a_weight(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 3)
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((8,), 3.0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert "__0_0.distcp is damaged; there is no other one beside it" in mistake(folder, {"model.w": torch.zeros(8)})


def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint .*file/c, step 1: Not a directory"):
        save_one(tmp_path / "file" / "c", 1)
    with pytest.raises(UserError, match=r"step 1: .*not JSON serializable"):
        checkpoint.save(tmp_path / "c", 1, tensors={"w": torch.zeros(1)}, values={"x": object()})
    assert list((tmp_path / "c").iterdir()) == []


def save_on_a_host_of_its_own(store: Path, directory: Path, rank: int, size: int, conn) -> None:
    """Each rank sees its own folder under the same name, as two hosts without a shared file system do."""
    os.chdir(directory / str(rank))
    real = Path.is_dir
    Path.is_dir = lambda self: real(self) and (rank == 0 or ".tmp-" not in self.name)
    save_a_stage(store, directory, rank, size, conn)


def test_hosts_without_a_shared_file_system_are_told_so_by_all_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / "c" / str(rank)).mkdir(parents=True)
    for reply in replies(start(save_on_a_host_of_its_own, tmp_path, tmp_path / "c", 2)):
        assert reply.startswith("UserError: checkpoint") and "(stage 1) does not see the folder" in reply
        assert "put --checkpoint on a file system that all hosts share" in reply
    assert checkpoint.find_latest(tmp_path / "c") is None


def die_while_saving(store: Path, directory: Path, rank: int, size: int, conn) -> None:
    if rank == 1:
        join_gloo(store, rank, size)
        conn.send("dead")
        os._exit(0)
    save_a_stage(store, directory, rank, size, conn)


def test_a_stage_that_goes_away_is_a_lost_peer_and_no_checkpoint(tmp_path: Path) -> None:
    first, second = replies(start(die_while_saving, tmp_path, tmp_path / "c", 2))
    assert second == "dead" and first.startswith("PeerLost: checkpoint") and "another stage went away" in first
    assert checkpoint.find_latest(tmp_path / "c") is None


def test_an_export_loads_strict_into_the_whole_model_with_its_ties(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {name: t for name, t in state(1, 0).items() if name != "model.block3.0.weight"}
    folder = checkpoint.save(tmp_path / "c", 1, tensors=tensors, values={})
    ties = {"block3.0.weight": "block0.0.weight"}
    checkpoint.export(folder, tmp_path / "new" / "m.safetensors", ties=ties)
    loaded = load_file(tmp_path / "new" / "m.safetensors")
    whole = model()
    whole.load_state_dict(loaded, strict=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model().state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.safetensors"]


def test_an_export_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", 1, tensors={"model.w": torch.zeros(1)}, values={})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--export .*m.safetensors: cannot be written"):
        checkpoint.export(folder, tmp_path / "file" / "m.safetensors")


def test_what_a_checkpoint_holds_can_be_read_by_a_person(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 4)
    described = json.loads((folder / "checkpoint.json").read_text())
    assert described["step"] == 4 and described["values"] == {"update": 4}
    assert set(described["files"]) == {".metadata", "__0_0.distcp"}
