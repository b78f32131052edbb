// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Programs at the root of cgroup2: captured pods' connects go to the proxy, names and SO_ORIGINAL_DST tell
 * the truth about them, and every connection is published under its exact tuple before its first packet
 * leaves. */
#include "hold.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define EBB_SOCK_STREAM 1
#define EBB_IPPROTO_MPTCP 262
#define EBB_SOL_SOCKET 1
#define EBB_SO_BINDTODEVICE 25
#define EBB_SOL_IP 0
#define EBB_SOL_TCP 6
#define EBB_SOL_IPV6 41
#define EBB_SO_ORIGINAL_DST 80 /* also IP6T_SO_ORIGINAL_DST */
#define EBB_PAGE_SIZE 4096

/* Return values of cgroup address hooks: refuse makes the system call fail with EPERM. */
#define EBB_REFUSE 0
#define EBB_ALLOW 1

/* First timeout of a SYN that is held, in jiffies (5 to 50 ms); each further one is twice as long. The number
 * of retries makes the last one come no earlier than without a mesh, if the clock ticks 250 times a second.
 */
#define EBB_HELD_TIMEOUT 5
#define EBB_HELD_RETRIES 13
#define EBB_TCP_SYNCNT 7

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_PROXIES);
  __type(key, __u32);
  __type(value, struct ebb_proxy);
} ebb_proxies SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, EBB_MAX_PROBERS);
  __type(key, __u32);
  __type(value, struct ebb_prober);
} ebb_probers SEC(".maps");

/* Only callable where a task is the cause: connect and bind. Both must match: a pid that is reused while no
 * agent watches belongs to a process in another cgroup. */
static __always_inline int is_proxy(void) {
  __u32 tgid = bpf_get_current_pid_tgid() >> 32;
  struct ebb_proxy* proxy = bpf_map_lookup_elem(&ebb_proxies, &tgid);

  return proxy && proxy->cgroup == bpf_get_current_cgroup_id();
}

/* Whether a kubelet is the cause, in its own network namespace. A thread of it that enters a pod's is not
 * believed. */
static __always_inline int is_prober(__u64 cookie) {
  __u32 tgid = bpf_get_current_pid_tgid() >> 32;
  struct ebb_prober* prober = bpf_map_lookup_elem(&ebb_probers, &tgid);

  return prober && prober->cookie == cookie && prober->cgroup == bpf_get_current_cgroup_id();
}

static __always_inline void count_capture(__u64 cookie, int steered) {
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

  if (!stats) return;
  if (steered)
    __sync_fetch_and_add(&stats->steered, 1);
  else
    __sync_fetch_and_add(&stats->captured, 1);
  stats->last_ns = bpf_ktime_get_boot_ns();
}

static __always_inline void count_probe(__u64 cookie) {
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

  if (stats) __sync_fetch_and_add(&stats->probes, 1);
}

/* Whether the pod holds as many flows as are free, the margin counted as held. */
static __always_inline int is_crowded(struct ebb_stats* all, struct ebb_stats* stats, __u32 margin) {
  __s32 own = stats->flows, total = all->flows;

  return own + (__s32)margin + total >= EBB_MAX_PUBLISHED;
}

/* Whether another connection of the pod would find room. */
static __always_inline int has_room(__u64 cookie) {
  __u64 every = EBB_ALL_PODS;
  struct ebb_stats* all = bpf_map_lookup_elem(&ebb_stats, &every);
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

  if (!all || !stats) return 0;
  if (!is_crowded(all, stats, EBB_FLOWS_MARGIN)) return 1;
  __sync_fetch_and_add(&stats->refused, 1);
  return 0;
}

/* Removes a flow; who removed it counts. */
static __always_inline void unpublish(struct ebb_tuple* key) {
  struct ebb_flow* flow = bpf_map_lookup_elem(&ebb_flows, key);
  __u64 every = EBB_ALL_PODS, cookie = key->cookie;
  __u32 kind, generation;
  struct ebb_stats* stats;

  if (!flow) return;
  kind = flow->kind;
  generation = flow->generation;
  if (bpf_map_delete_elem(&ebb_flows, key) || kind == EBB_KIND_INHERITED) return;
  stats = bpf_map_lookup_elem(&ebb_stats, &every);
  if (stats) __sync_fetch_and_add(&stats->flows, -1);
  stats = bpf_map_lookup_elem(&ebb_stats, &cookie);
  if (stats && stats->generation == generation) __sync_fetch_and_add(&stats->flows, -1);
}

/* Without room the connection stays unpublished: it is neither steered nor let out. */
static __always_inline void publish(struct ebb_tuple* key, struct ebb_flow* flow) {
  __u64 every = EBB_ALL_PODS, cookie = key->cookie;
  struct ebb_stats* all = bpf_map_lookup_elem(&ebb_stats, &every);
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

  /* Of an older connection with this tuple nothing may be left. */
  unpublish(key);
  if (!all || !stats || is_crowded(all, stats, 0)) return;
  flow->generation = stats->generation;
  if (bpf_map_update_elem(&ebb_flows, key, flow, BPF_NOEXIST)) return;
  __sync_fetch_and_add(&all->flows, 1);
  __sync_fetch_and_add(&stats->flows, 1);
}

static __always_inline int is_tcp(struct bpf_sock_addr* ctx) {
  return ctx->type == EBB_SOCK_STREAM &&
         (ctx->protocol == EBB_IPPROTO_TCP || ctx->protocol == EBB_IPPROTO_MPTCP);
}

/* A connect of a kubelet. Its probes reach a pod past the proxy, also when the proxy is down: the tuple of
 * exactly this connection is published for the pod's sk_lookup, which then lets its SYN pass to the
 * application. Who calls is known here, at the kubelet's own connect(), and nowhere later: an address or a
 * mark could be anybody's. So there is no SNAT, no rule on the host, and the pod sees the node's real
 * address. */
static __always_inline int decide_probe(struct bpf_sock_addr* ctx, const __u32* address) {
  struct ebb_owner_key key;
  struct ebb_socket* state;
  __u64* owner;

  ebb_copy(key.address, address);
  owner = bpf_map_lookup_elem(&ebb_owners, &key);
  if (!owner) {
    bpf_sk_storage_delete(&ebb_sockets, ctx->sk);
    return EBB_ALLOW;
  }
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!state) return EBB_ALLOW;
  state->kind = EBB_KIND_PROBE;
  state->pod = *owner;
  return EBB_ALLOW;
}

/* Stores in the socket where connect shall go instead. */
static __always_inline void aim(struct bpf_sock_addr* ctx, struct ebb_socket* state, const __u32* address,
                                __u16 port, __u32 hash) {
  state->kind = EBB_KIND_OUTBOUND;
  state->role = 0;
  state->held = 0;
  ebb_copy(state->address, address);
  state->port = port;
  if (ebb_is_mapped(address)) {
    /* 127.128.0.0/10: clear of the usual loopback addresses and of 127.255.255.255. */
    ebb_map4(state->target, bpf_htonl(0x7f800000 | (hash & 0x3fffff)));
    state->target_port = EBB_TARGET_PORT;
  } else {
    /* One address only, so ports spread the connections. */
    __u32 target_port = EBB_TARGET_PORT + hash % EBB_TARGET_PORTS;

    if (ctx->sk->src_port == target_port) target_port++;
    state->target[0] = 0;
    state->target[1] = 0;
    state->target[2] = 0;
    state->target[3] = bpf_htonl(1);
    state->target_port = target_port;
  }
}

static __always_inline __u32 hash_destination(const __u32* address, __u16 port) {
  return ebb_mix(ebb_mix(ebb_mix(address[0], address[1]), ebb_mix(address[2], address[3])), port);
}

/* Bound to another device the connect to loopback would time out. Returns whether it could be helped. */
static __always_inline int bind_to_loopback(struct bpf_sock_addr* ctx) {
  char lo[3] = "lo";

  return !ctx->sk->bound_dev_if || !bpf_setsockopt(ctx, EBB_SOL_SOCKET, EBB_SO_BINDTODEVICE, lo, sizeof(lo));
}

/* A connect of a pod that is not captured (yet): what to do, as decide_connect. */
static __always_inline int hold_connect(struct bpf_sock_addr* ctx, __u64 cookie, const __u32* address,
                                        __u16 port) {
  struct ebb_newcomer* newcomer;
  struct ebb_socket* state;
  struct ebb_held* sums = ebb_held_sums();
  __u64 id = 0;
  __u32 verdict;

  /* A socket may connect, disconnect and connect again: what was decided before must not be published. */
  bpf_sk_storage_delete(&ebb_sockets, ctx->sk);
  if (!ebb_may_hold(cookie) || ebb_is_any(address) || ebb_is_loopback(address)) return EBB_ALLOW;
  newcomer = ebb_newcomer_of_task(&id);
  if (!newcomer || !sums) return EBB_ALLOW;
  verdict = ebb_verdict_of(newcomer);
  if (verdict == EBB_VERDICT_PLAIN) return EBB_ALLOW;
  if (verdict != EBB_VERDICT_MESH) {
    __sync_fetch_and_add(&newcomer->refused_connects, 1);
    __sync_fetch_and_add(&sums->refused_connects, 1);
    return EBB_REFUSE;
  }
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!state) return EBB_REFUSE;
  aim(ctx, state, address, port, hash_destination(address, port));
  state->held = 1;
  state->pod = id;
  if (!bind_to_loopback(ctx)) return EBB_REFUSE;
  __sync_fetch_and_add(&newcomer->delayed_connects, 1);
  __sync_fetch_and_add(&sums->delayed_connects, 1);
  return 2;
}

/* Returns what to do with a connect to the address: 0 refuse, 1 allow as it is, 2 rewrite to socket->target.
 */
static __always_inline int decide_connect(struct bpf_sock_addr* ctx, const __u32* address, __u16 port) {
  __u64 cookie = bpf_get_netns_cookie(ctx);
  struct ebb_pod* pod = bpf_map_lookup_elem(&ebb_pods, &cookie);
  struct bpf_sock* listener;
  struct ebb_socket* state;
  __u32 hash;

  if (!pod) {
    if (is_prober(cookie)) return decide_probe(ctx, address);
    return is_proxy() ? EBB_ALLOW : hold_connect(ctx, cookie, address, port);
  }
  if (is_proxy()) {
    if (!has_room(cookie)) return EBB_REFUSE;
    state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!state) return EBB_REFUSE;
    if (state->kind != EBB_KIND_CLAIM) state->kind = EBB_KIND_PROXY;
    return EBB_ALLOW;
  }
  if (ebb_is_any(address) || ebb_is_loopback(address) || ebb_is_own(cookie, address)) {
    /* As in hold_connect: nothing of an earlier connect may be left. */
    bpf_sk_storage_delete(&ebb_sockets, ctx->sk);
    return EBB_ALLOW;
  }
  if (!(pod->flags & EBB_POD_CAPTURED)) return hold_connect(ctx, cookie, address, port);

  if (!has_room(cookie)) return EBB_REFUSE;
  hash = hash_destination(address, port);
  listener = ebb_find_listener(cookie, EBB_ROLE_OUTBOUND, hash);
  if (!listener) {
    struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

    if (stats) __sync_fetch_and_add(&stats->refused, 1);
    return EBB_REFUSE;
  }
  bpf_sk_release(listener);

  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!state) return EBB_REFUSE;
  aim(ctx, state, address, port, hash);
  ebb_copy(state->own, ebb_is_mapped(address) ? pod->ip4 : pod->ip6);
  return bind_to_loopback(ctx) ? 2 : EBB_REFUSE;
}

SEC("cgroup/connect4")
int ebb_connect4(struct bpf_sock_addr* ctx) {
  struct ebb_socket* state;
  __u32 address[4];
  int verdict;

  if (!is_tcp(ctx)) return EBB_ALLOW;
  ebb_map4(address, ctx->user_ip4);
  verdict = decide_connect(ctx, address, bpf_ntohs(ctx->user_port));
  if (verdict != 2) return verdict;
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (!state) return EBB_REFUSE;
  ctx->user_ip4 = state->target[3];
  ctx->user_port = bpf_htons(state->target_port);
  return EBB_ALLOW;
}

SEC("cgroup/connect6")
int ebb_connect6(struct bpf_sock_addr* ctx) {
  struct ebb_socket* state;
  __u32 address[4];
  int verdict;

  if (!is_tcp(ctx)) return EBB_ALLOW;
  address[0] = ctx->user_ip6[0];
  address[1] = ctx->user_ip6[1];
  address[2] = ctx->user_ip6[2];
  address[3] = ctx->user_ip6[3];
  verdict = decide_connect(ctx, address, bpf_ntohs(ctx->user_port));
  if (verdict != 2) return verdict;
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (!state) return EBB_REFUSE;
  ctx->user_ip6[0] = state->target[0];
  ctx->user_ip6[1] = state->target[1];
  ctx->user_ip6[2] = state->target[2];
  ctx->user_ip6[3] = state->target[3];
  ctx->user_port = bpf_htons(state->target_port);
  return EBB_ALLOW;
}

/* Remembers that the socket may be a listener of a pod that is held. */
static __always_inline void mark_listening(void* sk, __u64 cookie) {
  struct ebb_listening* listening;

  if (!ebb_may_hold(cookie)) return;
  listening = bpf_sk_storage_get(&ebb_listening, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (listening) listening->cookie = cookie;
}

/* Where the proxy's dial to an application comes from in truth, while the application is told of `client`:
 * the pod's own address, or of IPv4 one of loopback. There a port whose connection was closed from this side
 * can be taken again after a second (tcp_tw_reuse), elsewhere only after a minute; and each client has an
 * address named after the last three bytes of its own, so that clients do not use up each other's ports. Not
 * of IPv6: it has one loopback address, to which the kernel sends no reset from a closed port of another
 * address. */
static __always_inline void claim_source(__u32* source, const struct ebb_pod* pod, const __u32* client) {
  __u32 host = client[3] & bpf_htonl(0x00ffffff);

  if (!ebb_is_mapped(client)) {
    ebb_copy(source, pod->ip6);
    return;
  }
  /* Network and broadcast address of 127.0.0.0/8 are no source. */
  if (!host || host == bpf_htonl(0x00ffffff)) host = bpf_htonl(1);
  ebb_map4(source, bpf_htonl(0x7f000000) | host);
}

/* Returns what to do with the proxy's bind: 0 refuse, 1 allow as it is, 2 bind to port 0, 3 bind to
 * socket->own port 0. */
static __always_inline int decide_bind(struct bpf_sock_addr* ctx, const __u32* address, __u16 port) {
  __u64 cookie = bpf_get_netns_cookie(ctx);
  struct ebb_pod* pod = bpf_map_lookup_elem(&ebb_pods, &cookie);
  struct ebb_socket* state;

  if (is_proxy()) {
    if (!pod) return EBB_ALLOW;
  } else {
    if (!pod || !(pod->flags & EBB_POD_CAPTURED)) mark_listening(ctx->sk, cookie);
    return EBB_ALLOW;
  }
  if (ebb_is_any(address)) {
    if (port != EBB_OUTBOUND_PORT && port != EBB_PLAINTEXT_PORT && port != EBB_HBONE_PORT) return EBB_ALLOW;
    state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!state) return EBB_REFUSE;
    state->kind = EBB_KIND_LISTENER;
    state->role = port == EBB_OUTBOUND_PORT ? EBB_ROLE_OUTBOUND
                  : port == EBB_HBONE_PORT  ? EBB_ROLE_HBONE
                                            : EBB_ROLE_PLAINTEXT;
    return 2;
  }
  if (ebb_is_loopback(address) || (port == 0 && ebb_is_own(cookie, address))) return EBB_ALLOW;
  if (!(pod->flags & (ebb_is_mapped(address) ? EBB_POD_HAS_IP4 : EBB_POD_HAS_IP6))) return EBB_REFUSE;
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!state) return EBB_REFUSE;
  state->kind = EBB_KIND_CLAIM;
  ebb_copy(state->address, address);
  state->port = port;
  claim_source(state->own, pod, address);
  return 3;
}

SEC("cgroup/bind4")
int ebb_bind4(struct bpf_sock_addr* ctx) {
  struct ebb_socket* state;
  __u32 address[4];
  int verdict;

  if (!is_tcp(ctx)) return EBB_ALLOW;
  ebb_map4(address, ctx->user_ip4);
  verdict = decide_bind(ctx, address, bpf_ntohs(ctx->user_port));
  if (verdict < 2) return verdict;
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (!state) return EBB_REFUSE;
  if (verdict == 3) ctx->user_ip4 = state->own[3];
  ctx->user_port = 0;
  return EBB_ALLOW;
}

SEC("cgroup/bind6")
int ebb_bind6(struct bpf_sock_addr* ctx) {
  struct ebb_socket* state;
  __u32 address[4];
  int verdict;

  if (!is_tcp(ctx)) return EBB_ALLOW;
  address[0] = ctx->user_ip6[0];
  address[1] = ctx->user_ip6[1];
  address[2] = ctx->user_ip6[2];
  address[3] = ctx->user_ip6[3];
  verdict = decide_bind(ctx, address, bpf_ntohs(ctx->user_port));
  if (verdict < 2) return verdict;
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (!state) return EBB_REFUSE;
  if (verdict == 3) {
    ctx->user_ip6[0] = state->own[0];
    ctx->user_ip6[1] = state->own[1];
    ctx->user_ip6[2] = state->own[2];
    ctx->user_ip6[3] = state->own[3];
  }
  ctx->user_port = 0;
  return EBB_ALLOW;
}

/* The tuple as the socket sees it. A mapped AF_INET6 socket keeps its addresses mapped. Both families are
 * read before the choice, or the compiler would compute with the pointer to the socket, which the verifier
 * refuses. */
static __always_inline void socket_tuple(struct ebb_tuple* key, struct bpf_sock* socket) {
  volatile struct bpf_sock* sk = socket;
  __u32 local4 = sk->src_ip4, remote4 = sk->dst_ip4;
  __u32 local[4] = {sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]};
  __u32 remote[4] = {sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3]};

  if (sk->family == EBB_AF_INET) {
    ebb_map4(key->local, local4);
    ebb_map4(key->remote, remote4);
  } else {
    ebb_copy(key->local, local);
    ebb_copy(key->remote, remote);
  }
  key->local_port = sk->src_port;
  key->remote_port = bpf_ntohs(sk->dst_port);
}

static __always_inline void reverse_tuple(struct ebb_tuple* to, const struct ebb_tuple* from) {
  to->cookie = from->cookie;
  ebb_copy(to->local, from->remote);
  ebb_copy(to->remote, from->local);
  to->local_port = from->remote_port;
  to->remote_port = from->local_port;
  to->reserved = 0;
}

/* The other end as the socket's owner should see it. Keyed by tuple, because with MPTCP connect saw the
 * subflow and this sees the MPTCP socket. Returns whether there is something to say. */
static __always_inline int peer_name(struct bpf_sock_addr* ctx, __u32* address, __u16* port) {
  struct ebb_tuple key = {}, reverse = {};
  struct ebb_socket* state;
  struct ebb_flow* flow;

  if (!is_tcp(ctx) || !ctx->sk->dst_port) return 0;
  key.cookie = bpf_get_netns_cookie(ctx);
  socket_tuple(&key, ctx->sk);
  flow = bpf_map_lookup_elem(&ebb_flows, &key);
  if (flow) {
    if (flow->kind != EBB_KIND_OUTBOUND && flow->kind != EBB_KIND_CLAIM) return 0;
    ebb_copy(address, flow->address);
    *port = flow->port;
    return 1;
  }
  if (!ebb_is_loopback(key.remote) && !ebb_is_loopback(key.local)) return 0;
  /* The proxy asks who called: the pod, by the pod's own address. */
  reverse_tuple(&reverse, &key);
  flow = bpf_map_lookup_elem(&ebb_flows, &reverse);
  if (flow && flow->kind == EBB_KIND_OUTBOUND && ebb_is_loopback(key.remote) && flow->own[3]) {
    ebb_copy(address, flow->own);
    *port = key.remote_port;
    return 1;
  }
  /* TCP_FASTOPEN_CONNECT: connected by name, but the SYN waits for the first write. */
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (state && state->kind == EBB_KIND_OUTBOUND && state->target_port == key.remote_port &&
      state->target[3] == key.remote[3]) {
    ebb_copy(address, state->address);
    *port = state->port;
    return 1;
  }
  return 0;
}

/* The socket's own address as its owner should see it: the pod's, where connect to loopback made the kernel
 * choose loopback. */
static __always_inline int own_name(struct bpf_sock_addr* ctx, __u32* address) {
  struct ebb_tuple key = {};
  struct ebb_socket* state;
  struct ebb_flow* flow;

  if (!is_tcp(ctx) || !ctx->sk->dst_port) return 0;
  key.cookie = bpf_get_netns_cookie(ctx);
  socket_tuple(&key, ctx->sk);
  if (!ebb_is_loopback(key.local)) return 0;
  flow = bpf_map_lookup_elem(&ebb_flows, &key);
  if (flow && flow->kind == EBB_KIND_OUTBOUND) {
    ebb_copy(address, flow->own);
    return address[3] != 0;
  }
  state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (state && state->kind == EBB_KIND_OUTBOUND && state->target_port == key.remote_port &&
      state->target[3] == key.remote[3]) {
    ebb_copy(address, state->own);
    return address[3] != 0;
  }
  return 0;
}

SEC("cgroup/getpeername4")
int ebb_getpeername4(struct bpf_sock_addr* ctx) {
  __u32 address[4];
  __u16 port;

  if (peer_name(ctx, address, &port)) {
    ctx->user_ip4 = address[3];
    ctx->user_port = bpf_htons(port);
  }
  return EBB_ALLOW;
}

SEC("cgroup/getpeername6")
int ebb_getpeername6(struct bpf_sock_addr* ctx) {
  __u32 address[4];
  __u16 port;

  if (peer_name(ctx, address, &port)) {
    ctx->user_ip6[0] = address[0];
    ctx->user_ip6[1] = address[1];
    ctx->user_ip6[2] = address[2];
    ctx->user_ip6[3] = address[3];
    ctx->user_port = bpf_htons(port);
  }
  return EBB_ALLOW;
}

SEC("cgroup/getsockname4")
int ebb_getsockname4(struct bpf_sock_addr* ctx) {
  __u32 address[4];

  if (own_name(ctx, address)) ctx->user_ip4 = address[3];
  return EBB_ALLOW;
}

SEC("cgroup/getsockname6")
int ebb_getsockname6(struct bpf_sock_addr* ctx) {
  __u32 address[4];

  if (own_name(ctx, address)) {
    ctx->user_ip6[0] = address[0];
    ctx->user_ip6[1] = address[1];
    ctx->user_ip6[2] = address[2];
    ctx->user_ip6[3] = address[3];
  }
  return EBB_ALLOW;
}

/* SO_ORIGINAL_DST on a connection accepted by the proxy's outbound listener. Every other call is left as the
 * kernel answered it. */
SEC("cgroup/getsockopt")
int ebb_getsockopt(struct bpf_sockopt* ctx) {
  struct ebb_tuple seen = {}, key = {};
  __u8 *value = ctx->optval, *end = ctx->optval_end;
  struct ebb_flow* flow;

  if (ctx->optname != EBB_SO_ORIGINAL_DST || (ctx->level != EBB_SOL_IP && ctx->level != EBB_SOL_IPV6))
    goto untouched;
  if (!ctx->sk || ctx->sk->protocol != EBB_IPPROTO_TCP || !ctx->sk->dst_port) goto untouched;
  seen.cookie = bpf_get_netns_cookie(ctx);
  socket_tuple(&seen, ctx->sk);
  reverse_tuple(&key, &seen);
  flow = bpf_map_lookup_elem(&ebb_flows, &key);
  if (!flow || flow->kind != EBB_KIND_OUTBOUND) goto untouched;
  if (ctx->level == EBB_SOL_IP) {
    if (!ebb_is_mapped(flow->address) || value + 16 > end) goto untouched;
    *(__u16*)value = EBB_AF_INET;
    *(__u16*)(value + 2) = bpf_htons(flow->port);
    *(__u32*)(value + 4) = flow->address[3];
    *(__u64*)(value + 8) = 0;
    ctx->optlen = 16;
  } else {
    if (value + 28 > end) goto untouched;
    *(__u16*)value = EBB_AF_INET6;
    *(__u16*)(value + 2) = bpf_htons(flow->port);
    *(__u32*)(value + 4) = 0;
    ebb_copy((__u32*)(value + 8), flow->address);
    *(__u32*)(value + 24) = 0;
    ctx->optlen = 28;
  }
  barrier();
  ctx->retval = 0;
  return EBB_ALLOW;
untouched:
  /* The kernel shows a program one page only; 0 says that the caller's own buffer holds the answer. */
  if (ctx->optlen > EBB_PAGE_SIZE) ctx->optlen = 0;
  return EBB_ALLOW;
}

static __always_inline void sockops_tuple(struct ebb_tuple* key, struct bpf_sock_ops* ops) {
  volatile struct bpf_sock_ops* ctx = ops;
  __u32 local4 = ctx->local_ip4, remote4 = ctx->remote_ip4;
  __u32 local[4] = {ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]};
  __u32 remote[4] = {ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3]};

  if (ctx->family == EBB_AF_INET) {
    ebb_map4(key->local, local4);
    ebb_map4(key->remote, remote4);
  } else {
    ebb_copy(key->local, local);
    ebb_copy(key->remote, remote);
  }
  key->local_port = ctx->local_port;
  key->remote_port = bpf_ntohl(ctx->remote_port);
}

static __always_inline void watch_state(struct bpf_sock_ops* ctx) {
  bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* TCP_LISTEN_CB: a listener of the proxy takes the first free slot of its role. */
static __always_inline void on_listen(struct bpf_sock_ops* ctx, struct ebb_socket* state) {
  __u64 cookie = bpf_get_netns_cookie(ctx);
  struct ebb_listener_key key = {.cookie = cookie, .role = state->role};
  struct ebb_port_key port = {.cookie = cookie, .port = ctx->local_port};
  struct ebb_stats* stats;
  __u32 i, role = state->role;

  for (i = 0; i < EBB_MAX_SLOTS; i++) {
    key.slot = i;
    if (!bpf_sock_hash_update(ctx, &ebb_listeners, &key, BPF_NOEXIST)) break;
  }
  /* The port is closed to callers even when no slot was free. */
  watch_state(ctx);
  bpf_map_update_elem(&ebb_ports, &port, &role, BPF_ANY);
  if (i == EBB_MAX_SLOTS) return;
  stats = bpf_map_lookup_elem(&ebb_stats, &cookie);
  if (stats && stats->slots[role & 3] < i + 1) stats->slots[role & 3] = i + 1;
}

/* Of a held connect it is asked again, with each timeout of its SYN, whether the pod is captured by now. One
 * that is not held any more without being captured ends at its loopback address, where nobody listens. */
static __always_inline void look_again(struct ebb_socket* state, __u64 cookie) {
  struct ebb_pod* pod = bpf_map_lookup_elem(&ebb_pods, &cookie);
  __u64 id = state->pod;
  struct ebb_newcomer* newcomer;

  if (pod && (pod->flags & EBB_POD_CAPTURED)) {
    ebb_copy(state->own, ebb_is_mapped(state->address) ? pod->ip4 : pod->ip6);
    state->held = 0;
    return;
  }
  newcomer = bpf_map_lookup_elem(&ebb_newcomers, &id);
  if (!newcomer || ebb_verdict_of(newcomer) != EBB_VERDICT_MESH) state->held = 0;
}

/* TCP_CONNECT_CB, before the SYN leaves, and RTO_CB of a held connect, before it leaves again. */
static __always_inline void on_connect(struct bpf_sock_ops* ctx, struct ebb_socket* state) {
  struct ebb_tuple seen = {}, key = {};
  struct ebb_flow flow = {.kind = state->kind};

  seen.cookie = bpf_get_netns_cookie(ctx);
  sockops_tuple(&seen, ctx);
  if (state->held) {
    __u32 retries = EBB_HELD_RETRIES;

    if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
      bpf_setsockopt(ctx, EBB_SOL_TCP, EBB_TCP_SYNCNT, &retries, sizeof(retries));
      bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTO_CB_FLAG);
      return;
    }
    look_again(state, seen.cookie);
    if (state->held) return;
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTO_CB_FLAG);
  }
  if (state->kind == EBB_KIND_CLAIM) {
    /* Kept as the application's socket will see it. */
    reverse_tuple(&key, &seen);
    ebb_copy(flow.address, state->address);
    flow.port = state->port;
  } else if (state->kind == EBB_KIND_OUTBOUND) {
    if (state->target_port != seen.remote_port) return;
    __builtin_memcpy(&key, &seen, sizeof(key));
    ebb_copy(flow.address, state->address);
    ebb_copy(flow.own, state->own);
    flow.port = state->port;
  } else if (state->kind == EBB_KIND_PROXY) {
    __builtin_memcpy(&key, &seen, sizeof(key));
  } else if (state->kind == EBB_KIND_PROBE) {
    __builtin_memcpy(&key, &seen, sizeof(key));
    key.cookie = state->pod;
    count_probe(key.cookie);
  } else {
    return;
  }
  watch_state(ctx);
  publish(&key, &flow);
  if (state->kind == EBB_KIND_OUTBOUND) count_capture(seen.cookie, 0);
}

/* PASSIVE_ESTABLISHED_CB: an accepted connection, of the proxy or of an application. */
static __always_inline void on_accept(struct bpf_sock_ops* ctx, struct ebb_socket* state) {
  struct ebb_tuple key = {}, reverse = {};
  struct ebb_flow fresh = {};
  struct ebb_flow* flow;
  struct ebb_pod* pod;

  key.cookie = bpf_get_netns_cookie(ctx);
  pod = bpf_map_lookup_elem(&ebb_pods, &key.cookie);
  sockops_tuple(&key, ctx);
  if (state && state->kind == EBB_KIND_LISTENER) {
    if (state->role == EBB_ROLE_OUTBOUND) return;
    fresh.kind = EBB_KIND_ACCEPTED;
    watch_state(ctx);
    publish(&key, &fresh);
    count_capture(key.cookie, 1);
    return;
  }
  flow = bpf_map_lookup_elem(&ebb_flows, &key);
  if (flow && flow->kind == EBB_KIND_CLAIM) {
    flow->accepted = 1;
    watch_state(ctx);
  } else if (!flow && pod) {
    /* A probe: the application may answer for as long as its own socket lives, also after the kubelet's is
     * closed, or the rest of an answer would be sent again and again. */
    reverse_tuple(&reverse, &key);
    flow = bpf_map_lookup_elem(&ebb_flows, &reverse);
    if (!(pod->flags & EBB_POD_BYPASS_INBOUND) && !(flow && flow->kind == EBB_KIND_PROBE)) return;
    fresh.kind = EBB_KIND_BYPASS;
    watch_state(ctx);
    publish(&key, &fresh);
  }
}

/* STATE_CB with the new state TCP_CLOSE: what the socket published goes. */
static __always_inline void on_close(struct bpf_sock_ops* ctx, struct ebb_socket* state, int was_listening) {
  struct ebb_tuple seen = {}, key = {};
  struct ebb_flow* flow;

  seen.cookie = bpf_get_netns_cookie(ctx);
  sockops_tuple(&seen, ctx);
  if (was_listening) {
    struct ebb_port_key port = {.cookie = seen.cookie, .port = seen.local_port};

    if (state && state->kind == EBB_KIND_LISTENER) bpf_map_delete_elem(&ebb_ports, &port);
    return;
  }
  if (state && state->kind == EBB_KIND_CLAIM) {
    reverse_tuple(&key, &seen);
    flow = bpf_map_lookup_elem(&ebb_flows, &key);
    /* The application may ask for the peer after the proxy has closed. */
    if (flow && !flow->accepted) unpublish(&key);
    return;
  }
  if (state && state->kind == EBB_KIND_PROBE) seen.cookie = state->pod;
  unpublish(&seen);
}

SEC("sockops")
int ebb_sockops(struct bpf_sock_ops* ctx) {
  struct ebb_socket* state = 0;
  __u32 op = ctx->op;

  if (op != BPF_SOCK_OPS_TCP_LISTEN_CB && op != BPF_SOCK_OPS_TCP_CONNECT_CB &&
      op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_TIMEOUT_INIT &&
      op != BPF_SOCK_OPS_RTO_CB && !(op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE))
    return 1;
  if (ctx->sk) state = bpf_sk_storage_get(&ebb_sockets, ctx->sk, 0, 0);
  if (op == BPF_SOCK_OPS_STATE_CB) {
    on_close(ctx, state, ctx->args[0] == BPF_TCP_LISTEN);
  } else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
    on_accept(ctx, state);
  } else if (op == BPF_SOCK_OPS_TCP_LISTEN_CB) {
    if (state && state->kind == EBB_KIND_LISTENER)
      on_listen(ctx, state);
    else if (ctx->sk)
      mark_listening(ctx->sk, bpf_get_netns_cookie(ctx));
  } else if (state && op == BPF_SOCK_OPS_TIMEOUT_INIT) {
    if (state->held) ctx->reply = EBB_HELD_TIMEOUT;
  } else if (state && (op == BPF_SOCK_OPS_TCP_CONNECT_CB || state->held)) {
    on_connect(ctx, state);
  }
  return 1;
}
