#!/bin/bash
# In the place of a kubelet: makes one pod, whose container connects in its first instant, and writes to /state/first what came
# of it. kubelet.sh POD_UID
set -eu
cgroup=/sys/fs/cgroup/kubepods/besteffort/pod$1/container
ip netns add pod
ip link add pod0 type veth peer name eth0 netns pod
ip address add 10.9.0.1/24 dev pod0
ip link set pod0 up
ip -n pod address add 10.9.0.2/24 dev eth0
ip -n pod link set eth0 up
mkdir -p "$cgroup"
python3 -c '
import socket
listener = socket.create_server(("10.9.0.1", 8080))
print("ready", flush=True)
while True: listener.accept()[0].sendall(b"clear")' >/run/listener &
until grep -q ready /run/listener; do sleep 0.2; done
sh -c 'echo $$ >"$1"/cgroup.procs && exec nsenter --net=/run/netns/pod python3 -c "
import socket
try:
    print(socket.create_connection((\"10.9.0.1\", 8080), 20).recv(10).decode())
except OSError as error:
    print(\"errno\", error.errno)"' sh "$cgroup" >/state/first.new 2>&1
mv /state/first.new /state/first
sync
