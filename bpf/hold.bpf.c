// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Sees pods appear and go by their cgroups, and stops at the sockets what is held (hold.bpf.h says what and
 * why). */
#include "hold.bpf.h"

#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define EBB_NAME_SIZE 128
#define EBB_SCOPE_LEVELS 16
#define EBB_LOOPBACK_INDEX 1
#define EBB_DROP 0
#define EBB_PASS 1

/* The kernel's own, as far as they are read; the loader finds the offsets in its BTF. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct kernfs_node {
  const char* name;
  __u64 id;
};
struct cgroup;
struct cgroup_subsys_state {
  struct cgroup* cgroup;
  struct cgroup_subsys_state* parent;
};
struct cgroup_root {
  int hierarchy_id;
};
struct cgroup {
  struct cgroup_subsys_state self;
  struct kernfs_node* kn;
  struct cgroup_root* root;
};
#pragma clang attribute pop

static __always_inline int is_below(struct cgroup* cgroup, __u64 scope) {
  struct cgroup_subsys_state* css = BPF_CORE_READ(cgroup, self.parent);
  int i;

  if (!scope) return 1;
  for (i = 0; i < EBB_SCOPE_LEVELS && css; i++) {
    if (BPF_CORE_READ(css, cgroup, kn, id) == scope) return 1;
    css = BPF_CORE_READ(css, parent);
  }
  return 0;
}

/* UIDs are 36 characters, or 32 of static pods, of hexadecimal digits; the systemd driver writes dashes as
 * underscores. */
static __always_inline int read_uid(struct ebb_uid* uid, const char* from, __u32 size) {
  __u32 i;

  if (bpf_probe_read_kernel(uid->text, 32, from)) return 0;
  if (size == 36 && bpf_probe_read_kernel(uid->text + 32, 4, from + 32)) return 0;
  for (i = 0; i < 36; i++) {
    char c = uid->text[i];

    if (i >= size) break;
    if (c == '_')
      uid->text[i] = '-';
    else if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f') && !(c >= 'A' && c <= 'F') && c != '-')
      return 0;
  }
  return 1;
}

static __always_inline int begins_pod(const char* at) {
  char text[4] = {};

  if (bpf_probe_read_kernel(text, 3, at)) return 0;
  return text[0] == 'p' && text[1] == 'o' && text[2] == 'd';
}

/* Reads the UID out of a cgroup's name: podUID, or ...-podUID.slice by the systemd driver. */
static __always_inline int parse_name(struct ebb_uid* uid, const char* name) {
  char text[EBB_NAME_SIZE];
  long size = bpf_probe_read_kernel_str(text, sizeof(text), name);
  char slice[6];

  if (size <= 1) return 0;
  size--;
  if (size == 3 + 36 && begins_pod(name)) return read_uid(uid, name + 3, 36);
  if (size == 3 + 32 && begins_pod(name)) return read_uid(uid, name + 3, 32);
  if (size < 3 + 32 + 6) return 0;
  if (bpf_probe_read_kernel(slice, sizeof(slice), name + size - 6)) return 0;
  if (slice[0] != '.' || slice[1] != 's' || slice[2] != 'l' || slice[3] != 'i' || slice[4] != 'c' ||
      slice[5] != 'e')
    return 0;
  if (size >= 3 + 36 + 6 && begins_pod(name + size - 6 - 36 - 3))
    return read_uid(uid, name + size - 6 - 36, 36);
  if (begins_pod(name + size - 6 - 32 - 3)) return read_uid(uid, name + size - 6 - 32, 32);
  return 0;
}

SEC("raw_tp/cgroup_mkdir")
int ebb_mkdir(struct bpf_raw_tracepoint_args* ctx) {
  struct cgroup* cgroup = (struct cgroup*)ctx->args[0];
  struct ebb_hold_settings* settings = ebb_hold_settings();
  struct ebb_held* sums = ebb_held_sums();
  struct ebb_newcomer newcomer = {};
  __u64 id;

  if (!settings || !sums) return 0;
  /* 0 is the hierarchy of cgroup2; ids are unique within one hierarchy only. */
  if (BPF_CORE_READ(cgroup, root, hierarchy_id) != 0) return 0;
  if (!parse_name(&newcomer.uid, BPF_CORE_READ(cgroup, kn, name))) return 0;
  if (!is_below(cgroup, settings->scope)) return 0;
  newcomer.since_ns = bpf_ktime_get_boot_ns();
  id = BPF_CORE_READ(cgroup, kn, id);
  /* Two generations of this program see it while one takes over from the other. */
  if (bpf_map_lookup_elem(&ebb_newcomers, &id)) return 0;
  if (bpf_map_update_elem(&ebb_newcomers, &id, &newcomer, BPF_NOEXIST))
    __sync_fetch_and_add(&sums->unseen, 1);
  else
    __sync_fetch_and_add(&sums->newcomers, 1);
  return 0;
}

SEC("raw_tp/cgroup_rmdir")
int ebb_rmdir(struct bpf_raw_tracepoint_args* ctx) {
  struct cgroup* cgroup = (struct cgroup*)ctx->args[0];
  __u64 id;

  if (BPF_CORE_READ(cgroup, root, hierarchy_id) != 0) return 0;
  id = BPF_CORE_READ(cgroup, kn, id);
  bpf_map_delete_elem(&ebb_newcomers, &id);
  return 0;
}

/* Attached for every socket of the node, so that what is not for a listening socket goes on after three
 * instructions. The socket's own cgroup counts, because no task is the cause of a packet. */
SEC("cgroup_skb/ingress")
int ebb_hold_in(struct __sk_buff* skb) {
  struct bpf_sock* sk = skb->sk;
  struct ebb_newcomer* newcomer = 0;
  struct ebb_listening* listening;
  struct ebb_held* sums;
  struct ebb_pod* pod;
  __u64 cookie;
  int level;

  if (!sk || sk->state != BPF_TCP_LISTEN) return EBB_PASS;
  /* The pod's own calls to itself, by whichever of its addresses. */
  if (skb->ifindex == EBB_LOOPBACK_INDEX) return EBB_PASS;
  sk = bpf_sk_fullsock(sk);
  if (!sk) return EBB_PASS;
  listening = bpf_sk_storage_get(&ebb_listening, sk, 0, 0);
  if (!listening) return EBB_PASS;
  cookie = listening->cookie;
  if (!ebb_may_hold(cookie)) return EBB_PASS;
  pod = bpf_map_lookup_elem(&ebb_pods, &cookie);
  if (pod && (pod->flags & EBB_POD_CAPTURED)) return EBB_PASS;
  for (level = 1; level <= EBB_MAX_CGROUP_LEVEL && !newcomer; level++) {
    __u64 id = bpf_skb_ancestor_cgroup_id(skb, level);

    if (!id) break;
    newcomer = bpf_map_lookup_elem(&ebb_newcomers, &id);
  }
  if (!newcomer || ebb_verdict_of(newcomer) == EBB_VERDICT_PLAIN) return EBB_PASS;
  __sync_fetch_and_add(&newcomer->refused_inbound, 1);
  sums = ebb_held_sums();
  if (sums) __sync_fetch_and_add(&sums->refused_inbound, 1);
  return EBB_DROP;
}

/* SYNs of connects that wait; the retransmission timer sends them again. */
SEC("cgroup_skb/egress")
int ebb_hold_out(struct __sk_buff* skb) {
  struct bpf_sock* sk = skb->sk;
  struct ebb_socket* state;

  if (!sk || sk->state != BPF_TCP_SYN_SENT) return EBB_PASS;
  sk = bpf_sk_fullsock(sk);
  if (!sk) return EBB_PASS;
  state = bpf_sk_storage_get(&ebb_sockets, sk, 0, 0);
  return state && state->held ? EBB_DROP : EBB_PASS;
}
