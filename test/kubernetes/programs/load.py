"""Load of the cluster tests: connects again and again, and holds connections open. Counts on standard output, a JSON line
each half second, cumulative, so that the difference of two lines tells of the time between them.

load.py HOST PORT [WORKERS] [PAUSE_MS]    PORT speaks first and closes; PORT + 1 sends back what comes (held connections)
"""

import collections
import json
import socket
import sys
import threading
import time

HOST, PORT = sys.argv[1], int(sys.argv[2])
WORKERS = int(sys.argv[3]) if len(sys.argv) > 3 else 4
PAUSE = (int(sys.argv[4]) if len(sys.argv) > 4 else 20) / 1000
TIMEOUT = 10
HELD = 4

lock = threading.Lock()
counts = collections.Counter()
errors = collections.Counter()
slowest = [0.0]


def count(name, error=None):
    with lock:
        counts[name] += 1
        if error is not None:
            errors[f"{name}: {error}"] += 1


def ask():
    started = time.monotonic()
    try:
        with socket.create_connection((HOST, PORT), TIMEOUT) as connection:
            connection.settimeout(TIMEOUT)
            said = b""
            while part := connection.recv(4096):
                said += part
            json.loads(said)
        count("ok")
    except (OSError, ValueError) as error:
        count("failed", f"{type(error).__name__} {error} after {time.monotonic() - started:.2f} s")
    with lock:
        slowest[0] = max(slowest[0], time.monotonic() - started)


def worker():
    while True:
        ask()
        time.sleep(PAUSE)


def hold():
    """One connection after the other, each used ten times a second until it breaks."""
    while True:
        try:
            with socket.create_connection((HOST, PORT + 1), TIMEOUT) as connection:
                connection.settimeout(TIMEOUT)
                count("opened")
                while True:
                    connection.sendall(b"x")
                    if connection.recv(1) != b"x":
                        raise OSError("end of file")
                    count("echoed")
                    time.sleep(0.1)
        except OSError as error:
            count("broken", f"{type(error).__name__} {error}")
            time.sleep(0.1)


for _ in range(WORKERS):
    threading.Thread(target=worker, daemon=True).start()
for _ in range(HELD):
    threading.Thread(target=hold, daemon=True).start()
while True:
    with lock:
        line = {"at": time.time(), **counts, "slowest_ms": round(slowest[0] * 1000), "errors": dict(errors.most_common(8))}
        slowest[0] = 0.0
    print(json.dumps(line), flush=True)
    time.sleep(0.5)
