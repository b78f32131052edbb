"""Test server: one behaviour a port, IPv4 and IPv6. What happened to each connection is a JSON line on standard output."""

import hashlib
import json
import socket
import struct
import sys
import threading
import time

CHUNK = 1 << 20


def say(**event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def plain(address):
    """The text of an address, IPv4 also where the socket is IPv6."""
    host = address[0]
    return host[7:] if host.startswith("::ffff:") else host


def whoami(connection, peer):
    """Speaks first: says who it sees on both sides, and closes."""
    seen = {"peer": plain(peer), "peername": plain(connection.getpeername()), "local": plain(connection.getsockname())}
    connection.sendall((json.dumps(seen) + "\n").encode())


def echo(connection, _):
    """Sends back what comes, until end of file."""
    while data := connection.recv(CHUNK):
        connection.sendall(data)


def after_eof(connection, _):
    """Reads until end of file, waits, then gives a long answer: its own digest first, 8 MiB after it."""
    digest = hashlib.sha256()
    while data := connection.recv(CHUNK):
        digest.update(data)
    time.sleep(0.5)
    connection.sendall(digest.hexdigest().encode() + b"a" * (8 << 20))


def sink(connection, _):
    """Reads until end of file, then answers with count and digest."""
    digest, count, view = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    while got := connection.recv_into(view):
        digest.update(view[:got])
        count += got
    connection.sendall(json.dumps({"bytes": count, "sha256": digest.hexdigest()}).encode())


def source(connection, _):
    """Reads a count (8 bytes), sends so many bytes, then their digest (32 bytes)."""
    (count,) = struct.unpack("!Q", connection.recv(8, socket.MSG_WAITALL))
    digest, block = hashlib.sha256(), bytes(range(256)) * (CHUNK // 256)
    while count > 0:
        part = block[:count]
        connection.sendall(part)
        digest.update(part)
        count -= len(part)
    connection.sendall(digest.digest())


def finish_first(connection, _):
    """Sends a greeting and end of file at once, then still reads all that comes and logs its size."""
    connection.sendall(b"greeting")
    connection.shutdown(socket.SHUT_WR)
    count = 0
    while data := connection.recv(CHUNK):
        count += len(data)
    say(port=PORTS["finish-first"], received=count)


def reset(connection, _):
    """Reads a byte, then resets the connection."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def watch(connection, peer):
    """Greets, then logs how the connection ended: end of file or reset."""
    connection.sendall(b"w")
    how = "eof"
    try:
        while connection.recv(CHUNK):
            pass
    except ConnectionResetError:
        how = "reset"
    say(port=PORTS["watch"], peer=plain(peer), ended=how)


def stall(connection, _):
    """Reads nothing for ten seconds, then as sink does."""
    time.sleep(10)
    sink(connection, None)


BEHAVIOURS = {
    "whoami": whoami,
    "echo": echo,
    "after-eof": after_eof,
    "sink": sink,
    "source": source,
    "finish-first": finish_first,
    "reset": reset,
    "watch": watch,
    "stall": stall,
}
PORTS = {name: 9000 + i for i, name in enumerate(BEHAVIOURS)}


def handle(behaviour, connection, peer):
    with connection:
        try:
            behaviour(connection, peer)
        except OSError as error:
            say(behaviour=behaviour.__name__, peer=plain(peer), error=str(error))


def serve(behaviour, port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    while True:
        connection, peer = listener.accept()
        threading.Thread(target=handle, args=(behaviour, connection, peer), daemon=True).start()


threading.stack_size(256 * 1024)
for name, behaviour in BEHAVIOURS.items():
    threading.Thread(target=serve, args=(behaviour, PORTS[name])).start()
