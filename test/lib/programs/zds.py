"""A stranger at the ZDS socket: `zds.py SOCKET HOST PORT [NETNS]`. Greets as a proxy does and answers what it is asked; with
NETNS it first waits until it is taken for a proxy, then moves into that network namespace. When the agent has closed the
connection it connects to HOST and PORT, as a program that hopes to be taken for the proxy. Says as JSON what it came to."""

import ctypes
import json
import os
import socket
import sys
import time

CLONE_NEWNET = 0x40000000
HELLO, ACK = b"\x08\x01", b"\x0a\x00"
WAIT_S = 10

path, host, port, *netns = sys.argv[1:]
result = {"messages": 0, "descriptors": 0, "closed": False}
zds = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
zds.settimeout(0.2)
moved, deadline = not netns, time.monotonic() + WAIT_S
try:
    zds.connect(path)
    zds.send(HELLO)
    while time.monotonic() < deadline:
        try:
            message, descriptors, _, _ = socket.recv_fds(zds, 1024, 4)
        except TimeoutError:
            if not moved and result["messages"] > 0:
                # Asked nothing more: it knows all pods. ctypes, because os.setns came with Python 3.12.
                if ctypes.CDLL(None, use_errno=True).setns(os.open(netns[0], os.O_RDONLY), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
                moved = True
            continue
        if not message:
            result["closed"] = True
            break
        result["messages"] += 1
        result["descriptors"] += len(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        zds.send(ACK)
except (BrokenPipeError, ConnectionResetError):
    result["closed"] = True
result["moved"] = moved and bool(netns)
try:
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        result["answer"] = json.loads(connection.makefile().readline())
except (OSError, ValueError) as error:
    result["error"] = str(error)
print(json.dumps(result))
