/* SPDX-License-Identifier: Apache-2.0 */
/* What the programs of gateway and host share: records, maps, counters, drop reasons. Byte order is written at each
 * field; "host" below means the machine's own. */
#ifndef DSTM_H
#define DSTM_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET6 10
#define IPPROTO_DSTOPTS_ 60
#define IPPROTO_FRAGMENT_ 44
#define OUTER 40 /* bytes of an IPv6 header */
#define SECOND 1000000000ULL

/* TCX verdicts (linux/bpf.h of 6.6); older headers lack them. */
#define NEXT (-1)
#define PASS 0
#define DROP 2

#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV4 /* since 6.3 */
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#endif

enum drop_reason { /* = dataplane.DropReason */
	DROP_MALFORMED = 1,
	DROP_SESSION_EXPIRED = 2,
	DROP_NO_BINDING = 3,
	DROP_OUTER_SOURCE = 4,
	DROP_OUTER_DESTINATION = 5,
	DROP_INNER_ADDRESS = 6,
	DROP_ECN = 7,
	DROP_HAIRPIN = 8,
	DROP_TOO_BIG = 9,
	DROP_NO_ROUTE = 10,
	DROP_NOT_IPV4 = 11,
	DROP_OPTION = 12,
	DROP_INTERNAL = 13,
};
#define MAX_REASONS 32

enum direction { UP = 0, DOWN = 1 };

struct counters { /* per direction and CPU; host order */
	__u64 rx, rx_bytes, tx, tx_bytes, consumed;
	__u64 drops[MAX_REASONS];
};

struct config { /* host order but for the addresses */
	__u32 device; /* ifindex of the TUN */
	__u32 flags;
	__be32 placeholder; /* host role */
	__u32 hop_limit;
};
#define FLAG_HAIRPIN 1

struct binding_key {
	__be32 addr;
	__u8 psid_len; /* 0 = whole address */
	__u8 pad;
	__u16 psid; /* host order */
};

struct binding {
	struct in6_addr host;
	struct in6_addr tep;
	__u64 gen;	 /* host order */
	__u64 last_seen; /* CLOCK_BOOTTIME ns, coarse */
	__u32 mtu;	 /* inner bytes, 0 = the device's */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64); /* CLOCK_BOOTTIME ns; nothing is forwarded after it */
} deadline SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

static __always_inline struct counters *count(__u32 dir)
{
	return bpf_map_lookup_elem(&counters, &dir);
}

static __always_inline int drop(struct counters *c, __u32 reason)
{
	if (reason < MAX_REASONS)
		c->drops[reason]++;
	return DROP;
}

static __always_inline int expired(void)
{
	__u32 zero = 0;
	__u64 *d = bpf_map_lookup_elem(&deadline, &zero);
	return !d || bpf_ktime_get_boot_ns() > *d;
}

static __always_inline int same6(const struct in6_addr *a, const struct in6_addr *b)
{
	return a->s6_addr32[0] == b->s6_addr32[0] && a->s6_addr32[1] == b->s6_addr32[1] &&
	       a->s6_addr32[2] == b->s6_addr32[2] && a->s6_addr32[3] == b->s6_addr32[3];
}

/* An inner address that must never cross a tunnel: 0/8, 127/8, 224/3 (RFC 1812 section 5.3.7, RFC 6890). */
static __always_inline int martian(__be32 a)
{
	__u8 top = bpf_ntohl(a) >> 24;
	return top == 0 || top == 127 || top >= 224;
}

#endif
