/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Keys and values of the capture maps, shared by the BPF programs and native/capture. A change of any of them
 * needs a new version directory under the pins (EBB_PIN_VERSION): programs of two versions must never share a
 * map. */
#ifndef EBB_CAPTURE_H
#define EBB_CAPTURE_H

#include <linux/types.h>

#ifdef __cplusplus
#define EBB_ASSERT(condition) static_assert(condition, #condition)
#else
#define EBB_ASSERT(condition) _Static_assert(condition, #condition)
#endif

#define EBB_PIN_VERSION "v2"

#define EBB_MAX_PODS 1024
#define EBB_MAX_ADDRESSES 8192
#define EBB_MAX_PROXIES 64
#define EBB_MAX_PROBERS 16
/* Flows are shared by all pods, so what one pod may hold is bounded by what is free: it is refused more when
 * it holds as many as are free. One pod gets half at most, N hostile pods leave one part of N + 1 to the
 * others. */
#define EBB_MAX_FLOWS 131072
#define EBB_MAX_INHERITED 32768 /* of the flows: published by user space, bounded in the same way */
#define EBB_MAX_PUBLISHED (EBB_MAX_FLOWS - EBB_MAX_INHERITED)
/* connect() is refused a little earlier than publishing stops, so that a connect that is let is published. */
#define EBB_FLOWS_MARGIN 64
#define EBB_MAX_SLOTS 16
#define EBB_MAX_LISTENERS 16384

#define EBB_OUTBOUND_PORT 15001
#define EBB_PLAINTEXT_PORT 15006
#define EBB_HBONE_PORT 15008
/* Where captured connections are sent on loopback: 1024 ports that hardly any application asks for. The
 * proxy's end of an open one has that port, so that no listener without SO_REUSEADDR could. Below the
 * ephemeral range, or a socket could be given the target's port as its own and connect to itself. */
#define EBB_TARGET_PORT 13312
#define EBB_TARGET_PORTS 1024

/* Addresses are four words in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order. Cookies are
 * SO_NETNS_COOKIE. */

enum ebb_pod_flag {
  EBB_POD_CAPTURED = 1,       /* connects are rewritten */
  EBB_POD_BYPASS_INBOUND = 2, /* connections to the pod are the application's */
  EBB_POD_HAS_IP4 = 4,
  EBB_POD_HAS_IP6 = 8,
  EBB_POD_DRAINING = 16, /* let go, but for what the proxy has begun and HBONE to it */
};

enum ebb_role {
  EBB_ROLE_OUTBOUND = 0,
  EBB_ROLE_HBONE = 1,
  EBB_ROLE_PLAINTEXT = 2,
};

enum ebb_kind {
  EBB_KIND_NONE = 0,
  EBB_KIND_OUTBOUND = 1,  /* a captured connect: address is the original destination */
  EBB_KIND_CLAIM = 2,     /* the proxy's dial to the application: address is the client it speaks for */
  EBB_KIND_PROXY = 3,     /* a connection of the proxy that may leave the pod, from its SYN on */
  EBB_KIND_INHERITED = 4, /* open when the pod was captured */
  EBB_KIND_BYPASS = 5,    /* accepted by the application of a pod with EBB_POD_BYPASS_INBOUND */
  EBB_KIND_LISTENER = 6,  /* sockets only: a listener of the proxy, or accepted from one */
  EBB_KIND_ACCEPTED = 7,  /* accepted by the proxy: may leave the pod, but never begins with a SYN */
  EBB_KIND_PROBE = 8,     /* a connection of the kubelet to a pod, under the pod's cookie */
};

#define EBB_UID_SIZE 64

/* pods: cookie -> what is known of the pod. Written by user space only. */
struct ebb_pod {
  __u32 flags;
  __u32 reserved;
  __u32 ip4[4]; /* first IPv4 address, mapped */
  __u32 ip6[4];
  char uid[EBB_UID_SIZE]; /* zero-terminated; not read by programs */
};
EBB_ASSERT(sizeof(struct ebb_pod) == 104);

/* addresses: the pod's own addresses -> 1. */
struct ebb_address_key {
  __u64 cookie;
  __u32 address[4];
};
EBB_ASSERT(sizeof(struct ebb_address_key) == 24);

/* owners: the address of a known pod -> its cookie, for those who connect to it from the node. */
struct ebb_owner_key {
  __u32 address[4];
};
EBB_ASSERT(sizeof(struct ebb_owner_key) == 16);

/* proxies: tgid -> where that process was when it was trusted, so that a reused pid elsewhere is not. */
struct ebb_proxy {
  __u64 cgroup;
  __u64 start_ticks; /* field 22 of /proc/PID/stat; not read by programs */
};
EBB_ASSERT(sizeof(struct ebb_proxy) == 16);

/* probers: tgid -> the same for a kubelet, and the network namespace in which it is believed. */
struct ebb_prober {
  __u64 cgroup;
  __u64 start_ticks; /* not read by programs */
  __u64 cookie;
};
EBB_ASSERT(sizeof(struct ebb_prober) == 24);

/* flows: a connection as the socket that published it sees it; a claim is kept as the accepting side sees it.
 */
struct ebb_tuple {
  __u64 cookie;
  __u32 local[4];
  __u32 remote[4];
  __u16 local_port;
  __u16 remote_port;
  __u32 reserved;
};
EBB_ASSERT(sizeof(struct ebb_tuple) == 48);

struct ebb_flow {
  __u32 kind;
  /* Claims: the application's side is established and will remove the entry. Inherited: its SYN was answered.
   */
  __u32 accepted;
  __u32 address[4];
  __u32 own[4]; /* outbound: the pod's own address of that family, zero if it has none */
  __u16 port;
  __u16 reserved;
  __u32 generation; /* of the stats that count it */
};
EBB_ASSERT(sizeof(struct ebb_flow) == 48);

/* sockets (sk_storage): what connect or bind decided, for sockops to publish. */
struct ebb_socket {
  __u32 kind;
  __u32 role;
  __u32 address[4];
  __u32 own[4];
  __u32 target[4]; /* outbound: where connect was sent instead */
  __u16 port;
  __u16 target_port;
  __u32 held; /* outbound: of a pod that is not captured yet, so no SYN may leave */
  __u64 pod;  /* probes: the pod's cookie; held: id of the newcomer's cgroup */
};
EBB_ASSERT(sizeof(struct ebb_socket) == 72);

/* listeners (sockhash): the proxy's listening sockets. */
struct ebb_listener_key {
  __u64 cookie;
  __u32 role;
  __u32 slot;
};
EBB_ASSERT(sizeof(struct ebb_listener_key) == 16);

/* ports: local ports of the proxy's listeners -> role. */
struct ebb_port_key {
  __u64 cookie;
  __u32 port;
  __u32 reserved;
};
EBB_ASSERT(sizeof(struct ebb_port_key) == 16);

/* stats: cookie -> counters, changed by programs only. Of the entry with cookie 0 only `flows` is used: those
 * of all pods. */
#define EBB_ALL_PODS 0
struct ebb_stats {
  __u64 captured;
  __u64 steered;
  __u64 refused; /* connects refused because no listener was there */
  __u64 guard_drops;
  __u64 probes;     /* connections of the kubelet that were let through */
  __u64 last_ns;    /* CLOCK_BOOTTIME */
  __u32 slots[4];   /* by role: highest listener slot ever used, plus one */
  __u32 flows;      /* published by programs and not yet removed */
  __u32 generation; /* tells entries apart that were made for the same pod one after another */
};
EBB_ASSERT(sizeof(struct ebb_stats) == 72);

/* Holding of new pods (hold.bpf.h). UIDs are those of the cgroup's name, with dashes, padded with zeros. */
#define EBB_MAX_NEW_PODS 4096
#define EBB_MAX_CGROUP_LEVEL 12 /* of a pod's cgroup below the root of cgroup2 */
#define EBB_POD_UID_SIZE 40

enum ebb_verdict {
  EBB_VERDICT_NONE = 0, /* nobody has decided */
  EBB_VERDICT_PLAIN = 1,
  EBB_VERDICT_MESH = 2,
};

/* verdicts: UID -> what the agent decided. Written by user space only. */
struct ebb_uid {
  char text[EBB_POD_UID_SIZE];
};
EBB_ASSERT(sizeof(struct ebb_uid) == 40);

struct ebb_decision {
  __u32 verdict;
  __u32 reserved;
  __u64 free_ns; /* CLOCK_BOOTTIME of the moment from which it was free; 0 while it is not. Not read by
                    programs */
};
EBB_ASSERT(sizeof(struct ebb_decision) == 16);

/* newcomers: id of a pod's cgroup that was made while this was watched -> the pod. Programs only. */
struct ebb_newcomer {
  struct ebb_uid uid;
  __u64 since_ns;         /* CLOCK_BOOTTIME of the cgroup's making */
  __u64 refused_connects; /* EPERM */
  __u64 delayed_connects; /* made to wait until the pod is captured */
  __u64 refused_inbound;  /* packets to listening sockets that were dropped */
};
EBB_ASSERT(sizeof(struct ebb_newcomer) == 72);

enum ebb_hold {
  EBB_HOLD_OFF = 0,
  EBB_HOLD_REFUSE = 1, /* undecided newcomers are refused */
  EBB_HOLD_ALLOW = 2,  /* undecided newcomers are free */
};

/* hold: one entry. Written by user space only. */
struct ebb_hold_settings {
  __u32 mode;
  __u32 reserved;
  __u64 node;  /* cookie of the node's own network namespace */
  __u64 scope; /* id of the cgroup below which this node's pods are; 0 for all */
};
EBB_ASSERT(sizeof(struct ebb_hold_settings) == 24);

/* held: one entry, sums over all newcomers there ever were. Programs only. */
struct ebb_held {
  __u64 newcomers;
  __u64 unseen; /* newcomers that found no room: nothing is known of them, and they are not held */
  __u64 refused_connects;
  __u64 delayed_connects;
  __u64 refused_inbound;
};
EBB_ASSERT(sizeof(struct ebb_held) == 40);

/* listening (sk_storage): sockets that may be a newcomer's listeners, marked when they bind or listen. A
 * version takes this map over from another one's boot guard, and reads UIDs and times of newcomers: who
 * changes the layout of either gives it another name. */
struct ebb_listening {
  __u64 cookie;
};
EBB_ASSERT(sizeof(struct ebb_listening) == 8);

#endif
