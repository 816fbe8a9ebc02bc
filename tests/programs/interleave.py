"""Publication and Inbox under a scheduler: one thread per rank, one step at a time, in any order.

A step is one operation on a word, or half a payload. So every interleaving of the protocols that
the steps allow can be played, and a schedule repeats exactly. If the ranks' devices are late, each
is one more thread: what it is asked to write, read and give away, it does at steps of its own.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.transport.control_words import WordMap, Words
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Release
from mpi_dasgd.transport.rma.native_inbox import NativeInbox
from mpi_dasgd.transport.rma.native_publication import NativePublication
from mpi_dasgd.transport.rma.native_rank import NativeRank, WordHooks
from mpi_dasgd.transport.virtual.memory import SharedMemory
from tests.programs.late_player import LatePlayer
from tests.programs.ledger import Ledger, layout
from tests.programs.player import Player

__all__ = ["MOVES", "play"]

RANKS = 3
MOVES = ("publish", "claim", "release", "read", "send", "receive")
_ELEMENTS = 4


class Stage:
    """Lets one of several threads take one step at a time.

    Args:
        choices: which thread is next, of those that have not ended; modulo their number.
    """

    def __init__(self, choices: Iterator[int]) -> None:
        self._choices = choices
        self._turns: dict[threading.Thread, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Yield the stage until chosen again; before and after the play, do nothing."""
        turn = self._turns.get(threading.current_thread())
        if turn is not None:
            self._back.release()
            turn.acquire()

    def play(self, parts: Sequence[Callable[[], None]]) -> None:
        """Play all parts to their end, each in its own thread."""
        threads = [threading.Thread(target=self._act, args=(part,), daemon=True) for part in parts]
        self._turns = {thread: threading.Semaphore(0) for thread in threads}
        for thread in threads:
            thread.start()
        alive = threads
        while alive:
            self._turns[alive[next(self._choices) % len(alive)]].release()
            self._back.acquire()
            alive = [thread for thread in alive if thread in self._turns]
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _act(self, part: Callable[[], None]) -> None:
        thread = threading.current_thread()
        self._turns[thread].acquire()
        try:
            part()
        except BaseException as error:  # shown by `play`
            self._error = error
        del self._turns[thread]
        self._back.release()


class Memory:
    """Words and slots of all ranks as one of them sees them, with a step before each access.

    Args:
        stage: whose steps these are.
        memory: the memory.
        rank: the rank that sees it.
        in_place: whether other ranks' slots are in place, or need Get and Put.
    """

    def __init__(self, stage: Stage, memory: SharedMemory, rank: int, in_place: bool) -> None:
        self.layout = memory.layout
        self._stage = stage
        self._memory = memory
        self._rank = rank
        self._in_place = in_place

    def read(self, rank: int, index: int) -> int:
        self._stage.wait()
        return self._memory.read(rank, index)

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        self._stage.wait()
        return self._memory.swap(rank, index, expected, new)

    def view(self, rank: int, index: int) -> Message | None:
        return self._memory.view(rank, index) if self._in_place or rank == self._rank else None

    def get(self, rank: int, index: int, out: Message) -> None:
        self._copy(self._memory.view(rank, index), out)

    def put(self, rank: int, index: int, message: Message) -> None:
        self._copy(message, self._memory.view(rank, index))

    def _copy(self, source: Message, out: Message) -> None:
        # The header goes with the second half: the halves differ in any case.
        half = out.buffer.size - out.payload.nbytes // 2
        for part in (slice(half, None), slice(0, half)):
            self._stage.wait()
            out.buffer[part] = source.buffer[part]

    def fence(self) -> None:
        self._stage.wait()


class ContiguousMemory(SharedMemory):
    """Memory whose slots are where native code expects them: one after the other."""

    def __init__(self, layout: Layout, size: int, publication_slots: int, inbox_slots: int) -> None:
        super().__init__(layout, size, publication_slots, inbox_slots)
        slots = np.zeros((size, publication_slots + inbox_slots, layout.nbytes), np.uint8)
        self.addresses = [of_rank.ctypes.data for of_rank in slots]
        self._views = [[Message(slot, layout) for slot in of_rank] for of_rank in slots]

    def view(self, rank: int, index: int) -> Message:
        return self._views[rank][index]


class LateQueue:
    """Work of a rank's device, which a thread of its own does at its steps.

    Args:
        stage: whose steps these are.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._work: deque[Callable[[], object]] = deque()
        self.ended = False  # whether the rank asks for no more

    def submit(self, work: Callable[[], object]) -> None:
        self._work.append(work)

    def act(self) -> None:
        """Do all work, until the rank has ended."""
        while self._work or not self.ended:
            self._stage.wait()
            if self._work:
                self._work.popleft()()


def play(
    scripts: Sequence[Sequence[str]],
    choices: Iterator[int],
    seed: int = 0,
    *,
    in_place: bool = False,
    slots: int = 4,
    publication: type[Publication] = Publication,
    inbox: type[Inbox] = Inbox,
    library: Any = None,
    late: Callable[[Words, LateQueue, int, WordMap], Release] | None = None,
) -> tuple[Counter[str], Counter[str]]:
    """Play a script for each rank, then let all receive what is left.

    Args:
        scripts: for each rank a list of `MOVES`.
        choices: the schedule; endless.
        seed: of the choice of partners.
        in_place: see `Memory`.
        slots: of a publication and of an inbox.
        publication, inbox: the protocols to play.
        library: native library whose protocols are played instead, in place; None: those.
        late: makes the release of a rank whose device is late; None: no device.

    Returns:
        What was found, and what was done.
    """
    shared_memory = ContiguousMemory(layout(_ELEMENTS), RANKS, slots, slots)
    stage = Stage(choices)
    players: list[Player] = []
    queues: list[LateQueue] = []
    for rank in range(RANKS):
        memory = Memory(stage, shared_memory, rank, in_place)
        shared = memory, memory, shared_memory.word_map, rank, Counters()
        release = None
        if late is not None:
            queues.append(LateQueue(stage))
            release = late(memory, queues[-1], rank, shared_memory.word_map)
        if library is None:
            views: tuple[Publication, Inbox] = (
                publication(*shared, max_claims=slots - 2, release=release),
                inbox(*shared, release=release),
            )
        else:
            views = _native_views(library, memory, shared_memory, rank, slots - 2)
        parts = (
            *views,
            memory,
            Ledger(rank, RANKS, 2 * max(map(len, scripts))),
            _ELEMENTS,
            random.Random(seed + rank),
            stage.wait,
        )
        players.append(LatePlayer(queues[-1], *parts) if late else Player(*parts))

    def act(rank: int) -> None:
        player, script = players[rank], scripts[rank]
        for move in script:
            if move in ("publish", "release", "receive"):
                getattr(player, move)()
            else:
                getattr(player, move)(player.other())
        if queues:
            queues[rank].ended = True

    stage.play([*(partial(act, rank) for rank in range(RANKS)), *(q.act for q in queues)])
    ledgers = [player.ledger for player in players]
    for player in players:
        while player.claims:
            player.release()
    moved = True
    while moved:
        for queue in queues:
            queue.act()
        moved = sum(player.receive() for player in players) > 0
    sent = np.array([ledger.sent for ledger in ledgers])
    found: Counter[str] = Counter()
    done: Counter[str] = Counter()
    served = np.sum([ledger.served for ledger in ledgers], axis=0)
    found["served twice"] = int((served > 1).sum())
    for player in players:
        if isinstance(player, LatePlayer):
            found.update(player.late.found)
    for ledger in ledgers:
        ledger.lost(sent)
        found.update(ledger.found)
        done.update(ledger.done)
    return +found, done


def _native_views(
    library: Any, memory: Memory, shared_memory: ContiguousMemory, rank: int, max_claims: int
) -> tuple[Publication, Inbox]:
    """Return the native protocols of a rank."""
    word_map = shared_memory.word_map
    state = NativeRank(
        library, rank, [0] * RANKS, shared_memory.addresses, memory.layout.nbytes, word_map,
        Counters(), max_claims, WordHooks(memory.read, memory.swap, memory.fence),
    )  # fmt: skip
    shared = state, memory, memory, word_map, rank
    return NativePublication(*shared), NativeInbox(*shared)
