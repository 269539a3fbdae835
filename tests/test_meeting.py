"""What is local with a stock optimizer and collective here, called by one rank: refused there, within seconds."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE_S
from placements import place
from sessions import OPTIONS, Net, batch
from torch import nn
from torch.distributed.checkpoint import state_dict as torch_doors

import dist_optim
from dist_optim.errors import RanksDisagreeError
from dist_optim.ranks import first_meeting, meeting, whereabouts
from dist_optim.ranks.store_polling import is_set_within
from dist_optim.ranks.whereabouts import Call, Lookout, Whereabouts
from dist_optim.testing import RankFailure, RankPool

Act = Callable[[nn.Module, Any, Path], object]


IN_STEP = ("clip_grad_norm_()", "step()")


def trained(placement: str, name: str) -> tuple[nn.Module, Any]:
    model = place(Net(), placement)
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, rank_timeout_s=PATIENCE_S, **OPTIONS[name])
    optimizer.train()
    model(*batch(0), True).backward()
    optimizer.step()
    return model, optimizer


CALLS: dict[str, tuple[str, Act]] = {
    "save_checkpoint()": (
        "adamw_torch",
        lambda model, optimizer, folder: dist_optim.save_checkpoint(folder, model, optimizer),
    ),
    "load_checkpoint()": (
        "adamw_torch",
        lambda model, optimizer, folder: dist_optim.load_checkpoint(folder, model, optimizer),
    ),
    "eval()": ("schedule_free_adamw", lambda model, optimizer, folder: optimizer.eval()),
    "state_dict()": ("adamw_torch", lambda model, optimizer, folder: optimizer.state_dict()),
    "get_optimizer_state_dict": (
        "galore_adamw",
        lambda model, optimizer, folder: torch_doors.get_optimizer_state_dict(model, optimizer),
    ),
    "clip_grad_norm_()": ("adamw_torch", lambda model, optimizer, folder: optimizer.clip_grad_norm_(1.0)),
    "step()": ("galore_adamw", lambda model, optimizer, folder: optimizer.step()),
}
ELSEWHERE: dict[str, Act] = {
    "barrier": lambda model, optimizer, folder: dist.barrier(),
    "backward": lambda model, optimizer, folder: model(*batch(1), True).backward(),
}


@contextmanager
def impatience() -> Iterator[None]:
    """In a rank of a pool: looks and idle time are as many, and shorter."""
    with mock.patch.object(meeting, "PATIENCE_S", 0.3), mock.patch.object(whereabouts, "IDLE_S", 0.6):
        yield


@impatience()
def called_alone(call: str, elsewhere: str, folder: str) -> str:
    """On rank 0 the call; rank 1 waits in a collective of the engine's or its own until rank 0 comes there too."""
    name, act = CALLS[call]
    model, optimizer = trained("ddp", name)
    text = ""
    if dist.get_rank() == 0:
        try:
            act(model, optimizer, Path(folder))
        except RanksDisagreeError as error:
            text = str(error)
    ELSEWHERE[elsewhere](model, optimizer, Path(folder))
    if call not in IN_STEP:
        optimizer.zero_grad()
        model(*batch(1), True).backward()
        optimizer.step()  # all are there again, and nothing was left over
        act(model, optimizer, Path(folder))
    return text


def check_refusal(found: str) -> None:
    assert "needs all ranks, and was called on rank 0 while rank 1 waits in" in found
    assert "Call it on every rank" in found and "test_meeting.py" in found


@pytest.mark.parametrize(
    ("call", "elsewhere"),
    [("save_checkpoint()", "barrier"), *((call, "backward") for call in CALLS if call not in IN_STEP)],
)
def test_a_call_on_one_rank_is_refused_there(two_ranks: RankPool, call: str, elsewhere: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    if call == "load_checkpoint()":
        two_ranks.run(save, str(folder))
    check_refusal(two_ranks.run(called_alone, call, elsewhere, str(folder))[0])


def save(folder: str) -> None:
    dist_optim.save_checkpoint(folder, *trained("ddp", "adamw_torch"))


@pytest.mark.parametrize("call", IN_STEP)
def test_inside_a_step_too(call: str, tmp_path: Path) -> None:
    with RankPool(2) as pool:  # of its own: the collective that began the step stays behind
        check_refusal(pool.run(called_alone, call, "backward", str(tmp_path))[0])


@impatience()
def goes_on_after_a_refusal(folder: str) -> None:
    """Rank 0 catches the refusal of a step that it took alone, and all go on to the next one."""
    model, optimizer = trained("ddp", "galore_adamw")
    if dist.get_rank() == 0:
        with pytest.raises(RanksDisagreeError, match="needs all ranks"):
            optimizer.step()
    optimizer.zero_grad()
    model(*batch(1), True).backward()
    if dist.get_rank() == 0:
        with pytest.raises(RanksDisagreeError) as caught:
            optimizer.step()
        Path(folder, "said").write_text(str(caught.value))
    optimizer.step()


def test_a_step_after_a_refused_one_ends_the_job_and_says_why(tmp_path: Path) -> None:
    """Its collective is still there: the other rank's next step would meet it."""
    with RankPool(2) as pool, pytest.raises(RankFailure) as caught:
        pool.run(goes_on_after_a_refusal, str(tmp_path))
    assert "step() was called on rank 0 alone, was refused, and still waits" in (tmp_path / "said").read_text()
    assert "RanksDisagreeError" in str(caught.value) and "resume from the last checkpoint" in str(caught.value)


@impatience()
def at_other_calls(folder: str) -> str:
    model, optimizer = trained("ddp", "schedule_free_adamw")
    with pytest.raises(RanksDisagreeError) as caught:
        if dist.get_rank() == 0:
            optimizer.eval()
        else:
            dist_optim.save_checkpoint(folder, model, optimizer)
    dist.barrier()  # or who was told first would come to the other's call
    optimizer.eval()
    return str(caught.value)


def test_other_calls_are_told_apart_on_both_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(at_other_calls, str(tmp_path / "saved"))
    assert re.search(r"eval\(\) needs all ranks.* while rank 1 (is at save_checkpoint\(\)|waits in barrier)", first)
    assert re.search(r"save_checkpoint\(\) needs all ranks.* while rank 0 (is at eval\(\)|waits in barrier)", second)
    assert "is at" in first + second


@impatience()
def late(folder: str) -> int:
    """The other rank works for longer than ranks are patient: it comes, and nothing is refused."""
    model, optimizer = trained("ddp", "adamw_torch")
    if dist.get_rank() == 1:
        work = torch.randn(200, 200)
        looks = 0
        while looks < 3:  # as often as the first rank has looked, it is still at work
            work = work @ work.T / work.norm()
            looks = int(dist.distributed_c10d._get_default_store().add("looks", 0))
    store = dist.distributed_c10d._get_default_store()
    look = meeting.MeetingPlace.look_for_others

    def counting(place: meeting.MeetingPlace, call: Call) -> None:
        store.add("looks", 1)
        look(place, call)

    with mock.patch.object(meeting.MeetingPlace, "look_for_others", counting):
        dist_optim.save_checkpoint(folder, model, optimizer)
    return int(store.add("looks", 0))


def test_a_rank_that_works_is_waited_for(two_ranks: RankPool, tmp_path: Path) -> None:
    assert min(two_ranks.run(late, str(tmp_path / "saved"))) >= 3
    assert (tmp_path / "saved" / "checkpoint.json").exists()


def operations_of_a_call() -> tuple[int, int]:
    """Of the store: of an evaluation's two swaps, and of a step."""
    model, optimizer = trained("ddp", "schedule_free_adamw")
    (place,) = [one for one in meeting._places if one.is_open][:1]
    before = place._board.num_operations
    optimizer.eval()
    optimizer.train()
    between = place._board.num_operations
    model(*batch(1), True).backward()
    optimizer.step()
    return between - before, place._board.num_operations - between


def test_it_costs_two_operations_a_call_and_none_a_step(two_ranks: RankPool) -> None:
    for swaps, step in two_ranks.run(operations_of_a_call):
        assert swaps <= 2 * 4 and step == 0  # who comes last also clears the notes of the call before


@impatience()
def built_late(says_after_s: float) -> str:
    """The first build of a job: rank 1 comes when rank 0 has said that it waits for it."""
    said = io.StringIO()
    store = dist.distributed_c10d._get_default_store()

    def say(text: str, **_: Any) -> None:
        said.write(text)
        store.set("said", "1")

    with mock.patch.object(first_meeting, "SAID_AFTER_S", says_after_s):
        is_first = dist.get_rank() == 0
        with mock.patch("builtins.print", say) if is_first else contextlib.nullcontext():
            if dist.get_rank() == 1:
                store.wait(["said"])
            dist_optim.build_optimizer(Net(), "sgd", lr=0.1, print_audit=False)
    return said.getvalue()


def never_built() -> str:
    store = dist.distributed_c10d._get_default_store()
    with mock.patch.object(first_meeting, "SAID_AFTER_S", 0.1), contextlib.redirect_stderr(io.StringIO()):
        if dist.get_rank() == 1:
            store.wait(["given up"])
            return ""
        store.set_timeout(timedelta(seconds=0.3))
        with pytest.raises(RanksDisagreeError) as caught:
            dist_optim.build_optimizer(Net(), "sgd", lr=0.1, print_audit=False)
        store.set("given up", "1")
        return str(caught.value)


def test_who_waits_long_leaves_standard_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Negative control: torch's own wait writes to it."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    assert not is_set_within(store, "key", 0.05)
    assert capfd.readouterr().err == ""
    store.set("key", "1")
    assert is_set_within(store, "key", 0.0)
    with pytest.raises(RuntimeError):
        store.wait(["another"], timedelta(seconds=0.05))
    assert "timed out" in capfd.readouterr().err


def test_a_first_build_on_one_rank_says_whom_it_waits_for() -> None:
    with RankPool(2) as pool:  # of its own: its ranks have built nothing yet
        first, second = pool.run(built_late, 0.1)
        assert "rank 0 waits in build_optimizer() for rank 1, where it was not called yet" in first and not second
    with RankPool(2) as pool:
        (text, _) = pool.run(never_built)
        assert re.search(
            r"build_optimizer\(\) was called on rank 0, and within 0.3 s not on rank 1\. .*every rank", text
        )


@impatience()
def built_alone_later() -> str:
    model, _ = trained("ddp", "adamw_torch")
    text = ""
    if dist.get_rank() == 0:
        with pytest.raises(RanksDisagreeError) as caught:
            dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
        text = str(caught.value)
    model(*batch(1), True).backward()
    dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    return text


def test_a_later_build_on_one_rank_is_refused_there(two_ranks: RankPool) -> None:
    check_refusal(two_ranks.run(built_alone_later)[0])


def test_whereabouts_survive_the_board() -> None:
    found = Whereabouts(call=Call("eval()", (0, 1), 3), waits_in="barrier", answers=7)
    assert Whereabouts.from_text(found.to_text()) == found
    assert Lookout(0).look(1) == Whereabouts(answers=1)


FROM_ONE_TO_THE_NEXT = """
def barrier(arrived, lock):
    arrived.release()
    lock.acquire()
"""


def test_a_thread_that_goes_from_one_collective_to_the_next_does_not_wait() -> None:
    """The frames of both calls may have the same address, and stand on the same line."""
    names: dict[str, Any] = {}
    exec(compile(FROM_ONE_TO_THE_NEXT, "torch/distributed/distributed_c10d.py", "exec"), names)
    arrived, locks = threading.Semaphore(0), [threading.Lock() for _ in range(4)]
    for lock in locks:
        lock.acquire()
    thread = threading.Thread(target=lambda: [names["barrier"](arrived, lock) for lock in locks], daemon=True)
    thread.start()
    with mock.patch.object(whereabouts, "IDLE_S", 0.02):
        lookout = Lookout(thread.ident or 0)
        for lock in locks:
            arrived.acquire()
            time.sleep(0.05)  # by now it stands in the lock
            assert lookout.look(0).waits_in == "", "seen for the first time"
            while not lookout.look(0).waits_in.startswith("barrier"):
                time.sleep(0.05)
            lock.release()
    thread.join()
