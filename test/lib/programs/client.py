"""Test client: `client.py COMMAND HOST PORT [ARGUMENT]`; the result is one JSON object on standard output, exit code 0."""

import hashlib
import json
import selectors
import socket
import struct
import sys
import time

CHUNK = 1 << 20
TCP_FASTOPEN_CONNECT = 30
PATTERN = bytes(range(256)) * (CHUNK // 256)


def plain(address):
    host = address[0]
    return host[7:] if host.startswith("::ffff:") else host


def dial(host, port, timeout=30):
    return socket.create_connection((host, port), timeout=timeout)


def read_all(connection):
    parts = []
    while data := connection.recv(CHUNK):
        parts.append(data)
    return b"".join(parts)


def whoami(host, port, _):
    with dial(host, port) as connection:
        names = {"remote": plain(connection.getpeername()), "own": plain(connection.getsockname())}
        return {**json.loads(read_all(connection)), **names}


def echo(host, port, count):
    """Sends a text and has it back."""
    text = b"marker-" + str(count or "x").encode()
    with dial(host, port) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return {"ok": read_all(connection) == text}


def after_eof(host, port, _):
    """Request, shutdown, then a long answer."""
    request = PATTERN[:100_000]
    with dial(host, port) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    return {"digest": answer[:64].decode() == hashlib.sha256(request).hexdigest(), "bytes": len(answer) - 64}


def sink(host, port, count):
    """Sends so many bytes; compares the digest that the server computed."""
    left, digest = int(count), hashlib.sha256()
    with dial(host, port, 120) as connection:
        while left > 0:
            part = PATTERN[: min(left, CHUNK)]
            connection.sendall(part)
            digest.update(part)
            left -= len(part)
        connection.shutdown(socket.SHUT_WR)
        answer = json.loads(read_all(connection))
    return {"bytes": answer["bytes"], "same": answer["sha256"] == digest.hexdigest()}


def source(host, port, count):
    """Receives so many bytes; compares with the digest that follows them."""
    left, digest, view = int(count), hashlib.sha256(), memoryview(bytearray(CHUNK))
    with dial(host, port, 120) as connection:
        connection.sendall(struct.pack("!Q", left))
        while left > 0:
            got = connection.recv_into(view, min(left, CHUNK))
            if got == 0:
                return {"missing": left}
            digest.update(view[:got])
            left -= got
        return {"missing": 0, "same": read_all(connection) == digest.digest()}


def finish_first(host, port, _):
    """The server ends its direction first; this side still sends a lot afterwards."""
    with dial(host, port) as connection:
        greeting = read_all(connection)
        for _ in range(4):
            connection.sendall(PATTERN)
    return {"greeting": greeting.decode(), "sent": 4 * CHUNK}


def expect_reset(host, port, _):
    """Sends a byte to a server that resets; says what this side saw, and how soon."""
    with dial(host, port) as connection:
        connection.sendall(b"x")
        start = time.monotonic()
        try:
            outcome = "eof" if connection.recv(1) == b"" else "data"
        except ConnectionResetError:
            outcome = "reset"
        return {"outcome": outcome, "ms": round((time.monotonic() - start) * 1000)}


def send_reset(host, port, _):
    """Greeted, then resets the connection from this side."""
    with dial(host, port) as connection:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return {"ok": True}


def refused(host, port, limit):
    """Connects to where nobody listens, or nobody answers: says how the program learns of it, and how soon."""
    start = time.monotonic()
    outcome = "nothing"
    try:
        with dial(host, port, float(limit)) as connection:
            outcome = "eof" if connection.recv(1) == b"" else "data"
    except OSError as error:
        outcome = type(error).__name__
    return {"outcome": outcome, "ms": round((time.monotonic() - start) * 1000)}


def probe(host, port, more):
    """Connects to this port and more (comma separated), one after the other: `data` where the server spoke, else how it ended."""
    outcomes = {}
    for each in [str(port), *(more.split(",") if more else [])]:
        try:
            with dial(host, int(each), 8) as connection:
                outcomes[each] = "eof" if connection.recv(1) == b"" else "data"
        except OSError as error:
            outcomes[each] = type(error).__name__
    return outcomes


def spread(host, port, count):
    """Asks so many times who answers: connections by the server's own address, and failures."""
    servers, failures = {}, {}
    for _ in range(int(count)):
        try:
            with dial(host, port, 15) as connection:
                local = json.loads(read_all(connection))["local"]
                servers[local] = servers.get(local, 0) + 1
        except (OSError, ValueError) as error:
            failures[str(error)] = failures.get(str(error), 0) + 1
    return {"servers": servers, "failures": failures}


def bind_first(host, port, own):
    """Binds its own address and a port before it connects."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        connection.bind((own, 0))
        bound = connection.getsockname()[1]
        connection.connect((host, port))
        own = connection.getsockname()
        return {**json.loads(read_all(connection)), "own": plain(own), "kept": own[1] == bound}


def fast_open(host, port, how):
    """Sends with the connecting call itself (MSG_FASTOPEN), or lets connect() wait for the first bytes."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as connection:
        # Blocking: a time limit makes Python use it without, and then the first send says that it is under way.
        if how == "option":
            connection.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
            connection.connect((host, port))
            connection.sendall(b"fast-open")
        else:
            connection.sendto(b"fast-open", socket.MSG_FASTOPEN, (host, port))
        remote = plain(connection.getpeername())
        connection.shutdown(socket.SHUT_WR)
        return {"ok": read_all(connection) == b"fast-open", "remote": remote}


def close_first(host, port, count):
    """Connections one after the other, some 200 a second at most, each with one byte exchanged and ended from this side."""
    failures = {}
    for _ in range(int(count)):
        try:
            with dial(host, port, 10) as connection:
                connection.sendall(b"x")
                if connection.recv(1) != b"x":
                    raise OSError("ended early")
        except OSError as error:
            failures[str(error)] = failures.get(str(error), 0) + 1
        time.sleep(0.005)
    return {"failures": failures}


def many(host, port, count):
    """Opens so many connections at once, then exchanges a byte on each while all are open."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    selector, connections = selectors.DefaultSelector(), []
    for _ in range(int(count)):
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.connect_ex((host, port))
        selector.register(connection, selectors.EVENT_WRITE)
        connections.append(connection)
    deadline, opened, echoed, failures = time.monotonic() + 60, 0, 0, {}

    def fail(connection, error):
        failures[str(error)] = failures.get(str(error), 0) + 1
        selector.unregister(connection)

    for event, step in ((selectors.EVENT_WRITE, "open"), (selectors.EVENT_READ, "echo")):
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(1):
                connection = key.fileobj
                if step == "open":
                    error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if error != 0:
                        fail(connection, error)
                        continue
                    opened += 1
                else:
                    try:
                        echoed += len(connection.recv(1))
                    except OSError as error:
                        fail(connection, error)
                        continue
                selector.unregister(connection)
        if step == "open":
            for connection in connections:
                try:
                    connection.send(b"x")
                    selector.register(connection, selectors.EVENT_READ)
                except OSError as error:
                    failures[str(error)] = failures.get(str(error), 0) + 1
    for connection in connections:
        connection.close()
    return {"opened": opened, "echoed": echoed, "failures": failures}


def load(host, port, seconds):
    """Short connections, one after the other, and one long one beside; says how many failed and how."""
    end, done, failures, long_echoes, slowest = time.monotonic() + float(seconds), 0, {}, 0, 0.0
    long_lived = dial(host, port, 10)
    while time.monotonic() < end:
        began = time.monotonic()
        try:
            with dial(host, port, 10) as connection:
                connection.sendall(b"payload-in-clear")
                if connection.recv(64) != b"payload-in-clear":
                    raise OSError("ended early")
            done += 1
            slowest = max(slowest, time.monotonic() - began)
        except OSError as error:
            failures[str(error)] = failures.get(str(error), 0) + 1
            time.sleep(0.02)
        if long_lived is not None:
            try:
                long_lived.sendall(b"payload-in-clear")
                if long_lived.recv(64) != b"payload-in-clear":
                    raise OSError("ended early")
                long_echoes += 1
            except OSError as error:
                failures["long: " + str(error)] = 1
                long_lived = None
    long_ends = {"long_lived": long_lived is not None, "long_echoes": long_echoes}
    return {"done": done, "failures": failures, "slowest_ms": round(slowest * 1000), **long_ends}


def until_answered(host, port, seconds):
    """Connects again and again until the server, which speaks first, is heard: after how long, and after how many tries."""
    start, tried = time.monotonic(), 0
    while time.monotonic() < start + float(seconds):
        tried += 1
        try:
            with dial(host, port, 1) as connection:
                if connection.recv(1) != b"":
                    return {"ms": round((time.monotonic() - start) * 1000), "tried": tried}
        except OSError:
            pass
        time.sleep(0.02)
    return {"ms": None, "tried": tried}


def hammer(host, port, seconds):
    """Connects again and again to a server that speaks first, and says something itself: how often it was heard. Speaks of
    each first answer after silence on standard error."""
    end, counts = time.monotonic() + float(seconds), {"tried": 0, "connected": 0, "answered": 0}
    answered = False
    while time.monotonic() < end:
        counts["tried"] += 1
        heard = False
        try:
            with dial(host, port, 0.5) as connection:
                counts["connected"] += 1
                connection.sendall(b"said-in-clear")
                heard = connection.recv(1) != b""
        except OSError:
            pass
        counts["answered"] += heard
        if heard and not answered:
            sys.stderr.write("answered\n")
            sys.stderr.flush()
        answered = heard
        time.sleep(0.05)
    return counts


def hold(host, port, seconds):
    """Greeted, then waits: says how and when the connection ended."""
    with dial(host, port) as connection:
        if connection.recv(1) == b"":
            return {"outcome": "refused", "ms": 0}
        sys.stderr.write("open\n")
        sys.stderr.flush()
        start = time.monotonic()
        connection.settimeout(float(seconds))
        try:
            outcome = "eof" if connection.recv(1) == b"" else "data"
        except ConnectionResetError:
            outcome = "reset"
        except TimeoutError:
            outcome = "still open"
        return {"outcome": outcome, "ms": round((time.monotonic() - start) * 1000), "at": time.time() * 1000}


COMMANDS = {
    "whoami": whoami,
    "echo": echo,
    "after-eof": after_eof,
    "sink": sink,
    "source": source,
    "finish-first": finish_first,
    "expect-reset": expect_reset,
    "send-reset": send_reset,
    "refused": refused,
    "probe": probe,
    "spread": spread,
    "bind-first": bind_first,
    "fast-open": fast_open,
    "many": many,
    "close-first": close_first,
    "load": load,
    "until-answered": until_answered,
    "hammer": hammer,
    "hold": hold,
}

command, host, port, *rest = sys.argv[1:]
print(json.dumps(COMMANDS[command](host, int(port), rest[0] if rest else None)))
