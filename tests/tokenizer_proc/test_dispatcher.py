"""Which replica gets which request, over real pipes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worker_process import Wiring, take

from minisgl.channels import Inbox
from minisgl.messages import AbortRequest, Dispatched, TokenizedRequest, WorkerDown, WorkerUp, make_request_id
from minisgl.sampling_params import SamplingParams
from minisgl.tokenizer_proc.dispatcher import Dispatcher
from minisgl.tokenizer_proc.router import RoundRobin, make_router


def request(counter: int, http_index: int = 0) -> TokenizedRequest:
    return TokenizedRequest(make_request_id(http_index, 1, counter), [counter], SamplingParams(), [1, 2, 3])


@pytest.mark.parametrize(
    ("first", "alive", "expected"),
    [
        (0, [[0, 1, 2]] * 5, [0, 1, 2, 0, 1]),
        (1, [[0, 1, 2]] * 3, [1, 2, 0]),
        (7, [[0, 1]] * 3, [0, 1, 0]),
        (0, [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]], [0, 2, 0, 1, 2]),
        (0, [[2]] * 2, [2, 2]),
    ],
)
def test_round_robin_takes_turns_among_the_living(first: int, alive: list[list[int]], expected: list[int]) -> None:
    router = make_router("round_robin", first)
    assert [router.choose(request(0), indices) for indices in alive] == expected


class Replicas:
    def __init__(self, wiring: Wiring, count: int) -> None:
        self.wiring = wiring
        self.dispatcher = Dispatcher(count, RoundRobin())

    def up(self, index: int, epoch: int = 1) -> Inbox:
        inbox = self.wiring.inbox(f"scheduler-{index}", epoch, TokenizedRequest, AbortRequest)
        self.dispatcher.up(WorkerUp(f"scheduler-{index}", epoch, inbox.address))
        return inbox

    def down(self, index: int, epoch: int = 1) -> None:
        self.dispatcher.down(WorkerDown(f"scheduler-{index}", epoch, "killed"))


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    wiring = Wiring()
    replicas = Replicas(wiring, 2)
    yield replicas
    replicas.dispatcher.close()
    wiring.close()


def rids(messages: list[TokenizedRequest]) -> list[int]:
    return [message.rid & 0xFF for message in messages]


def test_requests_alternate_and_announcements_are_batched_per_http_worker(replicas: Replicas) -> None:
    first, second = replicas.up(0), replicas.up(1, epoch=4)
    for counter in range(4):
        replicas.dispatcher.dispatch(request(counter))
    replicas.dispatcher.dispatch(request(5, http_index=1))
    assert rids(take(first, 3)) == [0, 2, 5]
    assert rids(take(second, 2)) == [1, 3]
    announced = list(replicas.dispatcher.take_announcements())
    ids = [make_request_id(0, 1, counter) for counter in range(4)]
    assert announced == [
        (0, Dispatched(0, 1, [ids[0], ids[2]])),
        (0, Dispatched(1, 4, [ids[1], ids[3]])),
        (1, Dispatched(0, 1, [make_request_id(1, 1, 5)])),
    ]
    assert not list(replicas.dispatcher.take_announcements())


def test_requests_wait_for_the_first_replica_and_then_go_in_order(replicas: Replicas) -> None:
    for counter in range(3):
        replicas.dispatcher.dispatch(request(counter))
    assert not list(replicas.dispatcher.take_announcements())
    assert replicas.dispatcher.withdraw(make_request_id(0, 1, 1))
    assert not replicas.dispatcher.withdraw(make_request_id(0, 1, 1))
    inbox = replicas.up(0)
    messages = take(inbox, 2)
    assert rids(messages) == [0, 2]
    assert all(len(message.stamps) == 4 for message in messages)
    assert not replicas.dispatcher.held


def test_a_dead_replica_gets_nothing_and_its_next_life_does(replicas: Replicas) -> None:
    first, second = replicas.up(0), replicas.up(1)
    replicas.down(0)
    for counter in range(2):
        replicas.dispatcher.dispatch(request(counter))
    assert rids(take(second, 2)) == [0, 1]
    replicas.down(1)
    replicas.dispatcher.dispatch(request(2))
    reborn = replicas.up(0, epoch=2)
    replicas.down(0, epoch=1)  # old news
    replicas.dispatcher.dispatch(request(3))
    assert rids(take(reborn, 2)) == [2, 3]
    assert not first.wait(50)
    epochs = {
        (announcement.replica, announcement.epoch) for _, announcement in replicas.dispatcher.take_announcements()
    }
    assert epochs == {(1, 1), (0, 2)}


def test_an_abort_follows_its_request_and_goes_to_every_replica(replicas: Replicas) -> None:
    first, second = replicas.up(0), replicas.up(1)
    replicas.dispatcher.dispatch(request(1))
    abort = AbortRequest(make_request_id(0, 1, 1))
    replicas.dispatcher.abort(abort)
    dispatched, followed = take(first, 2)
    assert (dispatched.rid, followed) == (abort.rid, abort)
    assert take(second) == [abort]
