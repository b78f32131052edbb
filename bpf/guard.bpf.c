// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Ingress of the host side of a pod's veth: stops TCP that did not come from a socket which the proxy or the
 * kernel's own record of older connections published. Raw sockets and AF_PACKET never call connect(); here
 * they end. */
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#include "maps.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u64 pod_cookie = 0;

#define EBB_MAX_EXTENSIONS 8
#define TCP_FLAG_BYTE_SYN 0x02
#define TCP_FLAG_BYTE_ACK 0x10
/* Protocols that carry IP, and so TCP, out of sight: some nodes unpack them from any pod. */
#define EBB_IPPROTO_IPIP 4
#define EBB_IPPROTO_IPV6 41
#define EBB_IPPROTO_GRE 47
#define EBB_IPPROTO_ETHERIP 97
#define EBB_IPPROTO_MPLS 137

struct tcp_start {
  __be16 source;
  __be16 dest;
  __be32 seq;
  __be32 ack;
  __u8 offset; /* upper four bits, in words */
  __u8 flags;
};

struct ip4_start {
  __u8 version_ihl;
  __u8 tos;
  __be16 total_length;
  __be16 id;
  __be16 fragment;
  __u8 ttl;
  __u8 protocol;
  __be16 checksum;
  __be32 source;
  __be32 destination;
};

struct ip6_start {
  __be32 version;
  __be16 payload_length;
  __u8 next;
  __u8 hops;
  __be32 source[4];
  __be32 destination[4];
};

static __always_inline int drop(__u64 cookie) {
  struct ebb_stats* stats = bpf_map_lookup_elem(&ebb_stats, &cookie);

  if (stats) __sync_fetch_and_add(&stats->guard_drops, 1);
  return TC_ACT_SHOT;
}

/* offset: of the TCP header from the network header. length: bytes from there to the packet's end as its
 * header says, or -1 when the header cannot say (jumbograms), which counts as payload. */
static __always_inline int check_tcp(struct __sk_buff* skb, struct ebb_tuple* key, __u32 offset,
                                     long length) {
  struct tcp_start tcp;
  struct ebb_flow* flow;
  long header;
  int begins;

  if (bpf_skb_load_bytes_relative(skb, offset, &tcp, sizeof(tcp), BPF_HDR_START_NET))
    return drop(key->cookie);
  header = (tcp.offset >> 4) * 4;
  if (header < 20 || (length >= 0 && length < header)) return drop(key->cookie);
  begins = (tcp.flags & (TCP_FLAG_BYTE_SYN | TCP_FLAG_BYTE_ACK)) == TCP_FLAG_BYTE_SYN;
  if (length == header && !begins) return TC_ACT_UNSPEC;
  key->local_port = bpf_ntohs(tcp.source);
  key->remote_port = bpf_ntohs(tcp.dest);
  flow = bpf_map_lookup_elem(&ebb_flows, key);
  if (!flow) return drop(key->cookie);
  if (flow->kind == EBB_KIND_PROXY) return TC_ACT_UNSPEC;
  /* A tuple that outlives its connection, or one made up with TCP_REPAIR, begins nothing either. */
  if (flow->kind == EBB_KIND_INHERITED && !(begins && flow->accepted)) return TC_ACT_UNSPEC;
  /* Root in the pod can make a host of its own inside the pod and call the listener in any other's name: what
   * was accepted may answer, but not begin anything. */
  if (!begins && (flow->kind == EBB_KIND_ACCEPTED || flow->kind == EBB_KIND_BYPASS)) return TC_ACT_UNSPEC;
  return drop(key->cookie);
}

static __always_inline int hides_ip(__u8 protocol) {
  return protocol == EBB_IPPROTO_IPIP || protocol == EBB_IPPROTO_IPV6 || protocol == EBB_IPPROTO_GRE ||
         protocol == EBB_IPPROTO_ETHERIP || protocol == EBB_IPPROTO_MPLS;
}

static __always_inline int check_ip4(struct __sk_buff* skb, struct ebb_tuple* key) {
  struct ip4_start ip;
  __u32 header, total;

  if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET)) return drop(key->cookie);
  header = (ip.version_ihl & 15) * 4;
  if (ip.version_ihl >> 4 != 4 || header < 20) return drop(key->cookie);
  if (hides_ip(ip.protocol)) return drop(key->cookie);
  if (ip.protocol != EBB_IPPROTO_TCP) return TC_ACT_UNSPEC;
  if (ip.fragment & bpf_htons(0x3fff)) return drop(key->cookie);
  total = bpf_ntohs(ip.total_length);
  ebb_map4(key->local, ip.source);
  ebb_map4(key->remote, ip.destination);
  return check_tcp(skb, key, header, total ? (long)total - (long)header : -1);
}

static __always_inline int check_ip6(struct __sk_buff* skb, struct ebb_tuple* key) {
  __u32 offset = sizeof(struct ip6_start), payload;
  struct ip6_start ip;
  __u8 next, extension[8];
  int i;

  if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET)) return drop(key->cookie);
  if ((ip.version & bpf_htonl(0xf0000000)) != bpf_htonl(0x60000000)) return drop(key->cookie);
  payload = bpf_ntohs(ip.payload_length);
  next = ip.next;
  ebb_copy(key->local, ip.source);
  ebb_copy(key->remote, ip.destination);
  for (i = 0; i < EBB_MAX_EXTENSIONS; i++) {
    if (next == EBB_IPPROTO_TCP)
      return check_tcp(skb, key, offset, payload ? (long)payload + (long)sizeof(ip) - (long)offset : -1);
    if (hides_ip(next)) return drop(key->cookie);
    if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60) return TC_ACT_UNSPEC;
    if (bpf_skb_load_bytes_relative(skb, offset, extension, sizeof(extension), BPF_HDR_START_NET))
      return drop(key->cookie);
    if (next == 44) {
      /* What follows a fragment header may be out of sight, so only what is surely not TCP may pass. */
      if (extension[0] == 17 || extension[0] == 58) return TC_ACT_UNSPEC;
      return drop(key->cookie);
    }
    /* AH (51) counts its length in words less two, the others in units of eight bytes less one. */
    offset += next == 51 ? (extension[1] + 2) * 4 : (extension[1] + 1) * 8;
    next = extension[0];
  }
  return drop(key->cookie);
}

SEC("tc")
int ebb_guard(struct __sk_buff* skb) {
  struct ebb_tuple key = {.cookie = pod_cookie};
  __u64 cookie = pod_cookie;

  if (!bpf_map_lookup_elem(&ebb_pods, &cookie)) return TC_ACT_UNSPEC;
  if (skb->vlan_present) return drop(cookie);
  if (skb->protocol == bpf_htons(ETH_P_IP)) return check_ip4(skb, &key);
  if (skb->protocol == bpf_htons(ETH_P_IPV6)) return check_ip6(skb, &key);
  if (skb->protocol == bpf_htons(ETH_P_ARP)) return TC_ACT_UNSPEC;
  return drop(cookie);
}
