"""Run as a program: a bad line between two network devices, frame by frame; needs root.

    python slow_line.py forward DEVICE DEVICE SECONDS LOSS

For kernels without netem. `plain DEVICE` makes a device send frames as they are on a wire.
"""

import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time
from contextlib import suppress


def plain(device):
    """Let a device send frames as they are on a wire: no checksum or cutting left to a card."""
    with socket.socket() as control:
        for command in (0x17, 0x1F, 0x24, 0x2C):  # tx checksum, TSO, GSO, GRO: off
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", device.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, 0x8946, request.ljust(40, b"\0"))


def forward(one, other, delay_s, loss):
    """Carry frames between two devices, late, and not all of them."""
    ends = []
    for device in (one, other):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        end.bind((device, 0))
        ends.append(end)
    print("open", flush=True)
    chance, waiting, number = random.Random(0), [], 0
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for end in select.select(ends, [], [], wait)[0]:
            try:
                frame, (_, _, kind, *_) = end.recvfrom(70_000)
            except OSError:  # the cable is out
                continue
            if kind != socket.PACKET_OUTGOING and chance.random() >= loss:
                number += 1
                to = ends[1 - ends.index(end)]
                heapq.heappush(waiting, (time.monotonic() + delay_s, number, to, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(waiting)
            with suppress(OSError):
                to.send(frame)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    plain(*words) if what == "plain" else forward(*words[:2], *map(float, words[2:]))
