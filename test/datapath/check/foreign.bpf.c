// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Somebody else's programs, which do nothing, at the hooks that capture uses. */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("cgroup/connect4")
int foreign_connect(struct bpf_sock_addr* ctx) {
  return 1;
}

SEC("sk_lookup")
int foreign_lookup(struct bpf_sk_lookup* ctx) {
  return SK_PASS;
}

SEC("tc")
int foreign_tc(struct __sk_buff* skb) {
  return -1;
}
