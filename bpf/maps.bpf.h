/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The capture maps, and the questions that more than one program asks them. */
#ifndef EBB_MAPS_BPF_H
#define EBB_MAPS_BPF_H

// First: libbpf's headers need its types.
#include <linux/bpf.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "capture.h"

#define EBB_AF_INET 2
#define EBB_AF_INET6 10
#define EBB_IPPROTO_TCP 6

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_PODS);
  __type(key, __u64);
  __type(value, struct ebb_pod);
} ebb_pods SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_ADDRESSES);
  __type(key, struct ebb_address_key);
  __type(value, __u32);
} ebb_addresses SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_ADDRESSES);
  __type(key, struct ebb_owner_key);
  __type(value, __u64);
} ebb_owners SEC(".maps");

/* Preallocated on purpose: an allocation that fails under a burst of connections would refuse some of them.
 */
struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_FLOWS);
  __type(key, struct ebb_tuple);
  __type(value, struct ebb_flow);
} ebb_flows SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_SOCKHASH);
  __uint(max_entries, EBB_MAX_LISTENERS);
  __type(key, struct ebb_listener_key);
  __type(value, __u64);
} ebb_listeners SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_LISTENERS);
  __type(key, struct ebb_port_key);
  __type(value, __u32);
} ebb_ports SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_PODS + 1);
  __type(key, __u64);
  __type(value, struct ebb_stats);
} ebb_stats SEC(".maps");

static __always_inline void ebb_map4(__u32* to, __u32 ip4) {
  to[0] = 0;
  to[1] = 0;
  to[2] = bpf_htonl(0xffff);
  to[3] = ip4;
}

static __always_inline void ebb_copy(__u32* to, const __u32* from) {
  to[0] = from[0];
  to[1] = from[1];
  to[2] = from[2];
  to[3] = from[3];
}

static __always_inline int ebb_is_mapped(const __u32* a) {
  return a[0] == 0 && a[1] == 0 && a[2] == bpf_htonl(0xffff);
}

/* :: and 0.0.0.0, which connect() takes for loopback. */
static __always_inline int ebb_is_any(const __u32* a) {
  return a[0] == 0 && a[1] == 0 && a[3] == 0 && (a[2] == 0 || a[2] == bpf_htonl(0xffff));
}

static __always_inline int ebb_is_loopback(const __u32* a) {
  if (ebb_is_mapped(a)) return (a[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
  return a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == bpf_htonl(1);
}

static __always_inline int ebb_is_own(__u64 cookie, const __u32* address) {
  struct ebb_address_key key = {.cookie = cookie};

  ebb_copy(key.address, address);
  return bpf_map_lookup_elem(&ebb_addresses, &key) != 0;
}

static __always_inline __u32 ebb_mix(__u32 h, __u32 v) {
  h ^= v;
  h *= 0x9e3779b1;
  h ^= h >> 15;
  h *= 0x85ebca6b;
  return h ^ (h >> 13);
}

/* A listener of the role, chosen by the hash so that every packet of one handshake finds the same one; the
 * caller releases it. Slots have holes while one proxy takes over from another: several independent draws
 * keep the choice even. */
static __always_inline struct bpf_sock* ebb_find_listener(__u64 cookie, __u32 role, __u32 hash) {
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);
  struct ebb_listener_key key = {.cookie = cookie, .role = role};
  __u32 slots = stats ? stats->slots[role & 3] : 0;
  struct bpf_sock* sk;
  int i;

  if (slots == 0 || slots > EBB_MAX_SLOTS) slots = EBB_MAX_SLOTS;
  for (i = 0; i < 4; i++) {
    key.slot = hash % slots;
    sk = bpf_map_lookup_elem(&ebb_listeners, &key);
    if (sk) return sk;
    hash = ebb_mix(hash, i + 1);
  }
  for (i = 0; i < EBB_MAX_SLOTS; i++) {
    key.slot = i;
    sk = bpf_map_lookup_elem(&ebb_listeners, &key);
    if (sk) return sk;
  }
  return 0;
}

#endif
