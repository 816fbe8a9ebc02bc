"""Exchanges of models through payload slots on a device, `LateDevice`, by real ranks.

    device_slots.py exchange|allocation|opening|failure|death

Rank 0 prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import topology
from mpi_dasgd.codecs import ExchangeBuffers, NoCodec
from mpi_dasgd.config.schema import TransportConfig
from mpi_dasgd.errors import DeviceFailed, PeerLost, UserError
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from tests.support.late_codec import LateCodec
from tests.support.late_device import LateDevice, SharedRegion

ELEMENTS = 1000


class Watched(SharedRegion):
    """A region that notes when it is closed."""

    events: list[tuple[str, float]]
    kind: str

    def close(self) -> None:
        if self._map is not None:
            self.events.append((self.kind, time.monotonic()))
        super().close()


class WatchedDevice(LateDevice):
    """A device that notes in which order it is closed; told to, it fails where it is asked to.

    Args:
        fails: "allocation", "opening", "failure" (in an allocation, and for good), or "".
    """

    def __init__(self, fails: str) -> None:
        super().__init__((1e-3, 5e-3))
        self.events: list[tuple[str, float]] = []
        self._fails = fails

    def _watch(self, region: SharedRegion, kind: str) -> SharedRegion:
        region.__class__ = Watched
        assert isinstance(region, Watched)
        region.events, region.kind = self.events, kind
        return region

    def allocate(self, nbytes: int) -> SharedRegion:
        if self._fails == "allocation":
            raise UserError(f"{self.name}: no room for {nbytes} bytes")
        if self._fails == "failure":
            self.fail()
            self.check()
        return self._watch(super().allocate(nbytes), "own region")

    def open_region(self, handle: bytes, nbytes: int) -> SharedRegion:
        if self._fails == "opening":
            raise DeviceFailed(f"{self.name}: cudaIpcOpenMemHandle: invalid argument")
        return self._watch(super().open_region(handle, nbytes), "opened region")

    def bind(self) -> None:
        super().bind()
        self.check()

    def close(self) -> None:
        super().close()
        self.events.append(("work", time.monotonic()))


def exchange(comm: MPI.Intracomm, endpoint: RmaEndpoint, device: WatchedDevice) -> bool:
    """Average with the next rank, or try to; return whether the sum of the models is conserved."""
    inner = NoCodec(ELEMENTS, np.dtype(np.float32))
    codec = LateCodec(inner, device)
    x = np.full(ELEMENTS, comm.rank, np.float32)
    message = endpoint.publication.reserve()
    assert message is not None and message.body.size == inner.layout.body_nbytes
    with device.current_stream():
        codec.encode(x, message)
        message.stamp(rank=comm.rank, step=0, time_ns=endpoint.time_ns())
        endpoint.publication.publish()
        endpoint.flush()
        while not endpoint.is_flushed():
            time.sleep(1e-3)
        comm.Barrier()
        request = endpoint.begin_exchange([(comm.rank + 1) % comm.size])
        partner_model, reply_delta = request.partner_model, request.partner_delta
        assert partner_model is not None and reply_delta is not None
        assert (partner_model.payload == (comm.rank + 1) % comm.size).all()
        assert partner_model.header.rank == (comm.rank + 1) % comm.size
        codec.average_pair(x, ExchangeBuffers(partner_model=partner_model, reply_delta=reply_delta))
        reply_delta.stamp(rank=comm.rank, step=0, time_ns=endpoint.time_ns())
        endpoint.commit_exchange(request)
        endpoint.flush()
        while not endpoint.is_flushed():
            time.sleep(1e-3)
        comm.Barrier()
        for received in endpoint.inbox.receive():
            assert received.message.header.rank == (comm.rank - 1) % comm.size
            codec.average_pair(x, ExchangeBuffers(deltas=[received.message]))
            endpoint.inbox.free(received)
        endpoint.flush()
    total = comm.allreduce(x.astype(np.float64))
    return bool((total == comm.size * (comm.size - 1) / 2).all()) and codec.work.wrong == 0


def run(mode: str) -> None:
    comm = MPI.COMM_WORLD.Dup()
    device = WatchedDevice(mode if comm.rank == comm.size - 1 else "")
    layout = NoCodec(ELEMENTS, np.dtype(np.float32)).layout
    config = TransportConfig(heartbeat_timeout=3)
    graph = topology.build("ring" if comm.size > 2 else "complete", comm.size)
    found: dict = {}
    try:
        endpoint = RmaEndpoint(comm, layout, graph, config, device=device, memory="ipc")
    except UserError as error:
        events = [kind for kind, _ in device.events]
        found["errors"] = comm.gather((str(error), error.on_all_ranks, events))
    else:
        found["path"] = endpoint.transfer_mode
        found["conserved"] = exchange(comm, endpoint, device)
        if mode == "death":
            _die(comm, endpoint, device)
        endpoint.close()
        endpoint.close()
        found["events"] = comm.gather(device.events)
    files = list(Path("/dev/shm").glob(f"mpi-dasgd-late-{os.getpid()}-*"))
    found["left"] = comm.gather(len(files))
    if comm.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")  # in one piece, among those of others
        sys.stdout.flush()
    comm.Free()


def _die(comm: MPI.Intracomm, endpoint: RmaEndpoint, device: WatchedDevice) -> None:
    """Kill the last rank; the others report, and end as ranks do that have lost one."""
    comm.Barrier()
    if comm.rank == comm.size - 1:
        for file in Path("/dev/shm").glob(f"mpi-dasgd-late-{os.getpid()}-*"):
            file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    while not endpoint.membership.dead:
        endpoint.refresh_membership()
        time.sleep(0.01)
    try:
        endpoint.close()
    except PeerLost as lost:
        files = list(Path("/dev/shm").glob(f"mpi-dasgd-late-{os.getpid()}-*"))
        events = [kind for kind, _ in device.events]
        found = {"lost": str(lost), "events": events, "left": len(files)}
        sys.stdout.write(json.dumps(found) + "\n")  # in one piece, among those of others
        sys.stdout.flush()
        for file in files:
            file.unlink()
        os._exit(lost.exit_code)


if __name__ == "__main__":
    run(sys.argv[1])
