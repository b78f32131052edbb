/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* New pods are held until it is decided whether they belong to the mesh, and those that do until they are
 * captured. What was chosen, and why:
 *
 * - The kernel knows a pod by the UID in its cgroup's name. That cgroup is made before the first process of
 * the pod, so a program at the tracepoint cgroup_mkdir sees each pod in time, by whichever driver of
 * whichever runtime, also while no agent runs; watching directories from user space would be late by some
 * milliseconds and blind without an agent. Pods that are older than the programs have no entry and are never
 * touched.
 * - Verdicts are kept by UID, so that the agent can decide before the cgroup exists.
 * - Undecided: connect() fails with EPERM at once. It may be long until an agent is back, and a connection
 * that waits could not be finished in the right way if the verdict turned out to be plain.
 * - In the mesh, not captured yet: connect() is rewritten as it will be, and its SYN is dropped at the way
 * out until the pod is captured. It is sent again at intervals that double from a few jiffies, so the
 * application sees a slow connect, at most about twice as long as the pod was held. connect() itself cannot
 * sleep.
 * - To the pod: what arrives at a listening socket is dropped, so that callers try again. Refusing bind() or
 *   listen() instead would end applications that do nothing wrong.
 * - UDP is left alone: the mesh does not carry it, so holding it protects nothing, and a name that cannot be
 *   resolved in the first millisecond ends many an application.
 * - Whose network namespace is the node's is never touched: hostNetwork pods, among them the agent's own.
 * - Not held: packets that root in the pod makes by hand (AF_PACKET, IPPROTO_RAW). The guard stops them, from
 *   capture on. */
#ifndef EBB_HOLD_BPF_H
#define EBB_HOLD_BPF_H

#include "maps.bpf.h"

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_NEW_PODS);
  __type(key, struct ebb_uid);
  __type(value, struct ebb_decision);
} ebb_verdicts SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_NEW_PODS);
  __type(key, __u64);
  __type(value, struct ebb_newcomer);
} ebb_newcomers SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct ebb_hold_settings);
} ebb_hold SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct ebb_held);
} ebb_held SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_SK_STORAGE);
  __uint(map_flags, BPF_F_NO_PREALLOC);
  __type(key, int);
  __type(value, struct ebb_listening);
} ebb_listening SEC(".maps");

/* What connect or bind decided of a socket. Cloned to accepted sockets, so that those of the proxy's
 * listeners are known as the proxy's. */
struct {
  __uint(type, BPF_MAP_TYPE_SK_STORAGE);
  __uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
  __type(key, int);
  __type(value, struct ebb_socket);
} ebb_sockets SEC(".maps");

static __always_inline struct ebb_hold_settings* ebb_hold_settings(void) {
  __u32 only = 0;

  return bpf_map_lookup_elem(&ebb_hold, &only);
}

static __always_inline struct ebb_held* ebb_held_sums(void) {
  __u32 only = 0;

  return bpf_map_lookup_elem(&ebb_held, &only);
}

/* Whether pods in the network namespace can be held at all: not in the node's, and not where nothing is held.
 */
static __always_inline int ebb_may_hold(__u64 cookie) {
  struct ebb_hold_settings* settings = ebb_hold_settings();

  return settings && settings->mode != EBB_HOLD_OFF && settings->node != cookie;
}

/* What to do with a newcomer that is not captured: EBB_VERDICT_PLAIN is free, NONE refused, MESH held. */
static __always_inline __u32 ebb_verdict_of(struct ebb_newcomer* newcomer) {
  struct ebb_hold_settings* settings = ebb_hold_settings();
  struct ebb_decision* decision = bpf_map_lookup_elem(&ebb_verdicts, &newcomer->uid);
  __u32 verdict = decision ? decision->verdict : EBB_VERDICT_NONE;

  if (verdict == EBB_VERDICT_NONE && settings && settings->mode == EBB_HOLD_ALLOW) return EBB_VERDICT_PLAIN;
  return verdict;
}

/* The newcomer in whose cgroup the current task is, and that cgroup's id; 0 if there is none. */
static __always_inline struct ebb_newcomer* ebb_newcomer_of_task(__u64* cgroup) {
  int level;

  for (level = 1; level <= EBB_MAX_CGROUP_LEVEL; level++) {
    __u64 id = bpf_get_current_ancestor_cgroup_id(level);
    struct ebb_newcomer* newcomer;

    if (!id) return 0;
    newcomer = bpf_map_lookup_elem(&ebb_newcomers, &id);
    if (newcomer) {
      *cgroup = id;
      return newcomer;
    }
  }
  return 0;
}

#endif
