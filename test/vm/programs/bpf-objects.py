"""What is in the kernel of BPF, as JSON: programs with the instructions that the verifier processed, maps, links.

The verifier's count is in a program's fdinfo from Linux 5.16 on (fs: kernel/bpf/syscall.c, bpf_prog_show_fdinfo).
"""

import ctypes
import json
import os
import struct
import sys

BPF_CALL = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
# linux/bpf.h: commands for the next id and for a descriptor by id, of each kind; and the offset of the name in the info.
KINDS = {"programs": (11, 13), "maps": (12, 14), "links": (31, 30)}
OBJ_GET_INFO_BY_FD = 15
PROG_NAME_OFFSET, MAP_NAME_OFFSET, NAME_SIZE = 64, 24, 16

libc = ctypes.CDLL(None, use_errno=True)


def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes + bytes(128 - len(attributes)), 128)
    result = libc.syscall(BPF_CALL, command, buffer, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result, buffer.raw


def ids(command):
    last = 0
    while True:
        try:
            _, answer = bpf(command, struct.pack("II", last, 0))
        except FileNotFoundError:
            return
        last = struct.unpack_from("I", answer, 4)[0]
        yield last


def name_of(fd, offset):
    info = ctypes.create_string_buffer(512)
    bpf(OBJ_GET_INFO_BY_FD, struct.pack("IIQ", fd, 256, ctypes.addressof(info)))
    return info.raw[offset : offset + NAME_SIZE].split(b"\0")[0].decode()


def fdinfo(fd):
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return dict(line.strip().split(":\t", 1) for line in file if ":\t" in line)


def main():
    result = {kind: [] for kind in KINDS}
    for kind, (next_id, by_id) in KINDS.items():
        for each in ids(next_id):
            try:
                fd, _ = bpf(by_id, struct.pack("I", each))
            except FileNotFoundError:
                continue
            entry = {"id": each}
            if kind != "links":
                entry["name"] = name_of(fd, PROG_NAME_OFFSET if kind == "programs" else MAP_NAME_OFFSET)
            if kind == "programs":
                entry["verified"] = int(fdinfo(fd).get("verified_insns", -1))
            result[kind].append(entry)
            os.close(fd)
    json.dump(result, sys.stdout)


main()
