// SPDX-License-Identifier: Apache-2.0
// The host: what leaves the TUN goes to the gateway, what comes from the gateway arrives on the TUN. Without a lease a
// packet goes on to the TUN's reader, which asks for one.
#include "tunnel.h"

struct lease { /* addr 0 = none */
	__be32 addr;
	struct in6_addr host;
	struct in6_addr tep;
};

struct flow { /* as the host sees it: from the placeholder to a peer */
	__be32 peer;
	__be16 peer_port;
	__be16 port; /* ICMP echo: both are the identifier */
	__u8 proto;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lease);
} lease SEC(".maps");

struct { /* LRU: an evicted flow is learned again with its next packet out */
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct flow);
	__type(value, __u32);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64); /* CLOCK_BOOTTIME ns of the last packet */
} activity SEC(".maps");

static __always_inline void touch(void)
{
	__u32 zero = 0;
	__u64 *a = bpf_map_lookup_elem(&activity, &zero), now = bpf_ktime_get_boot_ns();
	if (a && now - *a > SECOND / 4)
		*a = now;
}

/* ports reads the ports, or the identifier of an ICMP echo. Other packets have none. */
static __always_inline void ports(struct __sk_buff *skb, __u32 at, const struct iphdr *ip, __be16 *src, __be16 *dst)
{
	__be16 p[4] = {};

	*src = *dst = 0;
	if (ip->frag_off & bpf_htons(0x1fff))
		return;
	if (ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_UDP) {
		if (!bpf_skb_load_bytes(skb, at + ip->ihl * 4, p, 4)) {
			*src = p[0];
			*dst = p[1];
		}
	} else if (ip->protocol == IPPROTO_ICMP) {
		if (!bpf_skb_load_bytes(skb, at + ip->ihl * 4, p, 8)) {
			__u8 type = bpf_ntohs(p[0]) >> 8;
			if (type == 8 || type == 0)
				*src = *dst = p[2];
		}
	}
}

/* rewrite changes one address of the packet and every checksum that covers it. */
static __always_inline int rewrite(struct __sk_buff *skb, __u32 at, const struct iphdr *ip, __u32 field, __be32 from,
				   __be32 to)
{
	const __u64 tcp = BPF_F_PSEUDO_HDR | 4, udp = tcp | BPF_F_MARK_MANGLED_0; /* the latter: 0 stays 0 (RFC 768) */
	__u32 l4 = at + ip->ihl * 4;

	if (!(ip->frag_off & bpf_htons(0x1fff))) {
		if (ip->protocol == IPPROTO_TCP && bpf_l4_csum_replace(skb, l4 + 16, from, to, tcp))
			return -1;
		if (ip->protocol == IPPROTO_UDP && bpf_l4_csum_replace(skb, l4 + 6, from, to, udp))
			return -1;
	}
	if (bpf_l3_csum_replace(skb, at + 10, from, to, 4))
		return -1;
	return bpf_skb_store_bytes(skb, at + field, &to, 4, 0);
}

SEC("tcx/egress") int host_device(struct __sk_buff *skb)
{
	__u32 zero = 0, one = 1;
	struct counters *c = count(UP);
	struct config *cfg = bpf_map_lookup_elem(&config, &zero);
	struct lease *l = bpf_map_lookup_elem(&lease, &zero);
	struct in6_addr src, dst;
	struct iphdr ip;

	if (!c || !cfg || !l)
		return DROP;
	c->rx++;
	c->rx_bytes += skb->len;
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return drop(c, DROP_NOT_IPV4);
	if (!inner(skb, 0, skb->len, &ip))
		return drop(c, DROP_MALFORMED);
	if (!l->addr || expired()) { /* the reader of the TUN asks for a lease */
		c->consumed++;
		return PASS;
	}
	if (ip.saddr == cfg->placeholder) {
		struct flow f = {.peer = ip.daddr, .proto = ip.protocol};

		ports(skb, 0, &ip, &f.port, &f.peer_port);
		bpf_map_update_elem(&flows, &f, &one, BPF_ANY);
		if (rewrite(skb, 0, &ip, 12, ip.saddr, l->addr))
			return drop(c, DROP_INTERNAL);
		ip.saddr = l->addr;
	}
	if (ip.saddr != l->addr || martian(ip.daddr))
		return drop(c, DROP_INNER_ADDRESS);
	touch();
	src = l->host;
	dst = l->tep;
	return encap(skb, c, cfg, &ip, &src, &dst);
}

static __always_inline int uplink(struct __sk_buff *skb, __u32 l2)
{
	__u32 zero = 0, bytes;
	struct config *cfg;
	struct counters *c;
	struct flow f = {};
	struct lease *l;
	struct ipv6hdr o;
	struct iphdr ip;
	int len, why;

	if (skb->protocol != bpf_htons(ETH_P_IPV6) || bpf_skb_load_bytes(skb, l2, &o, sizeof(o)))
		return NEXT;
	l = bpf_map_lookup_elem(&lease, &zero);
	if (!l || !l->addr || !same6(&l->host, &o.daddr))
		return NEXT;
	len = strip(skb, l2, &o);
	if (len == 0)
		return NEXT;
	c = count(DOWN);
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!c || !cfg)
		return DROP;
	c->rx++;
	c->rx_bytes += skb->len - l2;
	if (len < 0)
		return drop(c, -len);
	if (!same6(&l->tep, &o.saddr))
		return drop(c, DROP_OUTER_SOURCE);
	bytes = room(skb, l2, len, &o);
	if (!inner(skb, l2 + len, bytes, &ip))
		return drop(c, DROP_MALFORMED);
	if (expired())
		return drop(c, DROP_SESSION_EXPIRED);
	if (ip.daddr != l->addr || martian(ip.saddr))
		return drop(c, DROP_INNER_ADDRESS);
	touch();
	why = decap(skb, l2, len, &o, &ip);
	if (why)
		return drop(c, why);
	f.peer = ip.saddr;
	f.proto = ip.protocol;
	ports(skb, l2, &ip, &f.peer_port, &f.port);
	if (bpf_map_lookup_elem(&flows, &f) && rewrite(skb, l2, &ip, 16, l->addr, cfg->placeholder))
		return drop(c, DROP_INTERNAL);
	c->tx++;
	c->tx_bytes += bytes;
	return bpf_redirect(cfg->device, BPF_F_INGRESS);
}

SEC("tcx/ingress") int host_uplink_eth(struct __sk_buff *skb) { return uplink(skb, ETH_HLEN); }
SEC("tcx/ingress") int host_uplink_l3(struct __sk_buff *skb) { return uplink(skb, 0); }

char _license[] SEC("license") = "Dual MIT/GPL";
