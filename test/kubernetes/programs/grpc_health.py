"""grpc.health.v1.Health/Check over HTTP/2 by hand, for probes of the kubelet: grpc_health.py PORT SERVING|NOT_SERVING.

Just as much HTTP/2 (RFC 9113) as one unary call needs: request headers are not decoded, every stream is answered alike.
"""
import socketserver
import struct
import sys

DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
ACK, END_STREAM, END_HEADERS = 1, 1, 4
STATUS_200 = b"\x88"  # HPACK: entry 8 of the static table
STATUS = {"SERVING": 1, "NOT_SERVING": 2}[sys.argv[2]]
# The answer's only field, tag 1 of kind varint, as one message of gRPC: not compressed, two bytes.
MESSAGE = b"\0" + struct.pack(">I", 2) + bytes([0x08, STATUS])


def literal(name, value):
    """A header that is not indexed, both texts plain and short."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class Health(socketserver.StreamRequestHandler):
    def read(self, size):
        got = self.rfile.read(size)
        if len(got) < size:
            raise ConnectionError("the caller closed")
        return got

    def handle(self):
        try:
            self.read(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            self.wfile.write(frame(SETTINGS, 0, 0))
            while True:
                head = self.read(9)
                payload = self.read(int.from_bytes(head[:3], "big"))
                self.answer(head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, payload)
        except ConnectionError:
            pass

    def answer(self, kind, flags, stream, payload):
        if kind == SETTINGS and not flags & ACK:
            self.wfile.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.wfile.write(frame(PING, ACK, 0, payload))
        elif kind in (DATA, HEADERS) and flags & END_STREAM:
            headers = STATUS_200 + literal(b"content-type", b"application/grpc")
            self.wfile.write(frame(HEADERS, END_HEADERS, stream, headers))
            self.wfile.write(frame(DATA, 0, stream, MESSAGE))
            self.wfile.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, literal(b"grpc-status", b"0")))


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


Server(("", int(sys.argv[1])), Health).serve_forever()
