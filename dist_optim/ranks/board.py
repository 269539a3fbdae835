"""A board on which ranks leave counters and news, beside the training: the job's store, through a client of its own.

torch's store clients hold a lock while they wait, so the watch cannot share one with a thread that waits in it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from dist_optim.ranks.store_polling import is_set_within

__all__ = ["LEFT", "Board", "Kind", "News", "own_client"]

LEFT = "left"


class Kind(str, enum.Enum):
    """What a piece of news is about."""

    LOST = "lost"  # a rank has been silent for too long
    ENDED = "ended"  # a rank's process is gone, and it did not say that it leaves
    GONE = "gone"  # a rank left in good order, while another still waited for it
    FAILED = "failed"  # a rank ends with an error of its own
    ALARM = "alarm"  # a rank has lost a connection: beat faster, so that the missing rank is found soon
    ASK = "ask"  # a rank waits in a call of all ranks: say where you are
    CLOSING = "closing"  # the process that serves the store leaves in good order: use the store no more


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What one rank tells all others, once."""

    kind: Kind
    rank: int
    text: str = ""


class Board:
    """Counters, news and calls of one watch. Most methods are one operation of the store.

    Raises:
        RuntimeError: Any method, when the store does not answer, or is gone.
    """

    def __init__(self, store: dist.Store, prefix: str) -> None:
        self._store = store
        self.prefix = prefix
        self._num_read = 0
        self.num_operations = 0

    def beat(self, rank: int, value: str) -> None:
        """Write a rank's counter, or ``LEFT``."""
        self._client().set(self._key("beat", rank), value)

    def beat_of(self, rank: int) -> str:
        """Read a rank's counter. Every rank has written its own before the watch starts."""
        return self._client().get(self._key("beat", rank)).decode()

    def beats_of(self, ranks: Iterable[int]) -> dict[int, str]:
        """Read many counters, by one operation each."""
        return {rank: self.beat_of(rank) for rank in ranks}

    def publish(self, news: News) -> None:
        """Add to the news. All ranks read all news in the same order."""
        text, number = json.dumps(asdict(news)), self._num_read
        while self._client().compare_set(self._key("news", number), "", text).decode() != text:
            number += 1

    def news(self) -> list[News]:
        """What was published since the last call; one operation when there is none."""
        found: list[News] = []
        while self._client().check([key := self._key("news", self._num_read)]):
            given = json.loads(self._client().get(key))
            found.append(News(kind=Kind(given["kind"]), rank=given["rank"], text=given["text"]))
            self._num_read += 1
        return found

    @property
    def num_read(self) -> int:
        """News read so far: a place in the order that is the same for all ranks."""
        return self._num_read

    def say_where(self, rank: int, text: str) -> None:
        """Write where a rank is."""
        self._client().set(self._key("where", rank), text)

    def where_are(self, ranks: Sequence[int]) -> list[str]:
        """Read where these ranks are; each has written once before anybody asks."""
        return [text.decode() for text in self._client().multi_get([self._key("where", rank) for rank in ranks])]

    def arrive(self, call: str, num_ranks: int) -> bool:
        """Note that this rank makes a call; True when it is the last one to."""
        is_last = self._client().add(f"{self.prefix}/call/{call}", 1) == num_ranks
        if is_last:
            self._client().set(f"{self.prefix}/all/{call}", "1")
        return is_last

    def depart(self, call: str) -> None:
        """Take the note back."""
        self._client().add(f"{self.prefix}/call/{call}", -1)

    def all_arrived(self, call: str, timeout_s: float) -> bool:
        """Wait for the last rank to make the call, for so long at most."""
        return is_set_within(self._client(), f"{self.prefix}/all/{call}", timeout_s)

    def forget(self, call: str) -> None:
        """Remove the notes of a call that is over."""
        for kind in ("call", "all"):
            self._client().delete_key(f"{self.prefix}/{kind}/{call}")

    def count_gone(self, own: int) -> int:
        """Add this rank (1, or 0 to look) to those that need the store no more, and return their number."""
        return int(self._client().add(self._key("gone", 0), own))

    def _client(self) -> dist.Store:
        self.num_operations += 1
        return self._store

    def _key(self, what: str, number: int) -> str:
        return f"{self.prefix}/{what}/{number}"


def own_client(store: dist.Store, timeout_s: float) -> dist.Store | None:
    """Another client of the same store, without its key prefixes; None for a kind of store that is not known here.

    Args:
        store: What the process group was initialised with.
        timeout_s: How long an operation may take. A TCPStore whose server is stopped blocks for longer all the same.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    timeout = timedelta(seconds=timeout_s)
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, None, False, timeout, wait_for_workers=False)
    if isinstance(store, dist.FileStore):
        # Without a number of ranks, no client removes the file while others use it.
        client = dist.FileStore(getattr(store, "path"))  # noqa: B009  torch's stubs do not know it
        client.set_timeout(timeout)
        return client
    return None
