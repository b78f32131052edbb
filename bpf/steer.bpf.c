// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* sk_lookup in a pod's network namespace: hands connections that are captured or come from elsewhere to the
 * proxy's listeners. bpf_get_netns_cookie cannot be called here, so each pod has its own load with its cookie
 * as read-only data. */
#include "maps.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u64 pod_cookie = 0;

SEC("sk_lookup")
int ebb_steer(struct bpf_sk_lookup* ctx) {
  struct ebb_tuple key = {.cookie = pod_cookie};
  struct ebb_port_key port = {.cookie = pod_cookie};
  __u64 cookie = pod_cookie;
  struct ebb_pod* pod;
  struct ebb_flow* flow;
  struct bpf_sock* sk;
  __u32 role, hash;
  long err;

  if (ctx->protocol != EBB_IPPROTO_TCP) return SK_PASS;
  pod = bpf_map_lookup_elem(&ebb_pods, &cookie);
  if (!pod) return SK_PASS;

  /* The key is the connecting side's view: its local address is remote here. */
  if (ctx->family == EBB_AF_INET) {
    ebb_map4(key.local, ctx->remote_ip4);
    ebb_map4(key.remote, ctx->local_ip4);
  } else {
    key.local[0] = ctx->remote_ip6[0];
    key.local[1] = ctx->remote_ip6[1];
    key.local[2] = ctx->remote_ip6[2];
    key.local[3] = ctx->remote_ip6[3];
    key.remote[0] = ctx->local_ip6[0];
    key.remote[1] = ctx->local_ip6[1];
    key.remote[2] = ctx->local_ip6[2];
    key.remote[3] = ctx->local_ip6[3];
  }
  key.local_port = bpf_ntohs(ctx->remote_port);
  key.remote_port = ctx->local_port;

  flow = bpf_map_lookup_elem(&ebb_flows, &key);
  if (flow && flow->kind == EBB_KIND_OUTBOUND) {
    role = EBB_ROLE_OUTBOUND;
  } else {
    /* Nobody reaches the proxy's listeners by their ports, from inside or from outside. */
    port.port = key.remote_port;
    if (bpf_map_lookup_elem(&ebb_ports, &port)) return SK_DROP;
    /* Where connect sends what is captured (127.128.0.0/10), no listener of the pod may be found instead. */
    if (key.remote_port == EBB_TARGET_PORT && ebb_is_mapped(key.remote) &&
        (key.remote[3] & bpf_htonl(0xffc00000)) == bpf_htonl(0x7f800000))
      return SK_DROP;
    /* The kubelet's own probes are the application's, whether the proxy lives or not. */
    if (flow && flow->kind == EBB_KIND_PROBE) return SK_PASS;
    /* By address, never by interface: a connection to the own address shows the index of eth0. */
    if (ebb_is_loopback(key.local) || ebb_is_own(cookie, key.local)) return SK_PASS;
    role = key.remote_port == EBB_HBONE_PORT ? EBB_ROLE_HBONE : EBB_ROLE_PLAINTEXT;
    /* A pod that is let go is plain again; peers that have not learnt of it yet still come by HBONE. One that
     * is about to be captured is not: what is passed here, and let in by ebb_hold_in a moment later, would
     * reach the application past the proxy. */
    if ((pod->flags & EBB_POD_DRAINING) && role != EBB_ROLE_HBONE) return SK_PASS;
    if (pod->flags & EBB_POD_BYPASS_INBOUND) return SK_PASS;
  }

  hash = ebb_mix(key.local[3], ((__u32)key.local_port << 16) | key.remote_port);
  sk = ebb_find_listener(cookie, role, hash);
  if (!sk) return SK_DROP;
  /* Without the flag a program in the pod could join the listener's reuseport group. */
  err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
  bpf_sk_release(sk);
  return err ? SK_DROP : SK_PASS;
}
