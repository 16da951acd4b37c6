"""Work on a stream beside the current one, with streams that write down what is asked of them."""

import weakref
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from nsa.kernels import streams

DEVICE = torch.device("cuda")


class Stream:
    """A stream's name and the streams it waited for."""

    device = DEVICE

    def __init__(self, name: str) -> None:
        self.name, self.waited = name, list[str]()

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other.name)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Stream]:
    """The current stream and the one beside it while a graph is captured."""
    current, beside = Stream("current"), Stream("beside")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream))
    monkeypatch.setattr(streams, "_side_stream", lambda device: beside)
    return current, beside


def test_work_beside_waits_for_all_before_it(capture: tuple[Stream, Stream]) -> None:
    with streams.SideStream(DEVICE).fork() as used:
        assert used is capture[1]
    assert (capture[0].waited, capture[1].waited) == ([], ["current"])


def test_what_comes_after_the_join_waits_for_work_beside(capture: tuple[Stream, Stream]) -> None:
    side = streams.SideStream(DEVICE)
    with side.fork():
        pass
    side.join()
    assert capture[0].waited == ["beside"]


def test_memory_that_is_kept_lives_until_the_join(capture: tuple[Stream, Stream]) -> None:
    side, tensor = streams.SideStream(DEVICE), torch.empty(1)
    alive = weakref.ref(tensor)
    side.keep(tensor)
    del tensor
    assert alive() is not None
    side.join()
    assert alive() is None


@pytest.mark.parametrize(("device", "capturing"), [("cuda", False), ("cpu", True)])
def test_there_is_one_stream_outside_of_a_graph(
    device: str, capturing: bool, capture: tuple[Stream, Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    side, tensor = streams.SideStream(torch.device(device)), torch.empty(1)
    alive = weakref.ref(tensor)
    side.keep(tensor)
    del tensor
    with side.fork():
        pass
    side.join()
    assert (capture[0].waited, capture[1].waited, alive()) == ([], [], None)
