// SPDX-License-Identifier: Apache-2.0
// The gateway: tunnels end at uplink ingress and begin at the egress of the TUN.
#include "tunnel.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH); /* never LRU: an evicted binding is a host cut off in silence */
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct binding_key);
	__type(value, struct binding);
} bindings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, struct in6_addr);
	__type(value, __u32);
} teps SEC(".maps");

static __always_inline struct binding *find(__be32 addr)
{
	struct binding_key k = {.addr = addr};
	return bpf_map_lookup_elem(&bindings, &k);
}

/* fits says whether the inner packet at `at`, or every segment of a super-packet, is within the MTU of the binding. */
static __always_inline int fits(struct __sk_buff *skb, __u32 at, const struct iphdr *ip, const struct binding *b)
{
	__u32 l4 = ip->ihl * 4, len = bpf_ntohs(ip->tot_len);
	__u8 offset = 8 / 4 << 4; /* of the data behind a UDP header, as in TCP */

	if (!b->mtu)
		return 1;
	if (skb->gso_size) {
		if (ip->protocol == IPPROTO_TCP && bpf_skb_load_bytes(skb, at + l4 + 12, &offset, 1))
			return 0;
		len = l4 + (offset >> 4) * 4 + skb->gso_size;
	}
	return len <= b->mtu;
}

/* hairpin sends a packet from one host straight to another: the outer header is rewritten in place, because a packet
 * that was decapsulated keeps tunnel state and cannot be encapsulated again. */
static __always_inline int hairpin(struct __sk_buff *skb, struct counters *c, const struct config *cfg, __u32 l2,
				   int len, struct iphdr *ip, __u32 bytes, const struct binding *to)
{
	struct in6_addr src = to->tep, dst = to->host;
	__u8 ttl = ip->ttl, hops = cfg->hop_limit;
	__be16 old, new, proto = bpf_htons(ETH_P_IPV6);

	if (!(cfg->flags & FLAG_HAIRPIN) || ttl <= 1)
		return drop(c, DROP_HAIRPIN);
	old = bpf_htons(ttl << 8 | ip->protocol);
	ttl--;
	new = bpf_htons(ttl << 8 | ip->protocol);
	if (bpf_l3_csum_replace(skb, l2 + len + 10, old, new, 2) ||
	    bpf_skb_store_bytes(skb, l2 + len + 8, &ttl, 1, 0) ||
	    bpf_skb_store_bytes(skb, l2 + 7, &hops, 1, 0) ||
	    bpf_skb_store_bytes(skb, l2 + 8, &src, sizeof(src), 0) ||
	    bpf_skb_store_bytes(skb, l2 + 24, &dst, sizeof(dst), 0))
		return drop(c, DROP_INTERNAL);
	if (!l2 && (bpf_skb_change_head(skb, ETH_HLEN, 0) || bpf_skb_store_bytes(skb, 12, &proto, 2, 0)))
		return drop(c, DROP_INTERNAL); /* output wants a link header */
	return output(skb, c, cfg->device, &src, &dst, bytes);
}

static __always_inline int uplink(struct __sk_buff *skb, __u32 l2)
{
	__u32 zero = 0, bytes;
	struct ipv6hdr o;
	struct iphdr ip;
	struct config *cfg;
	struct binding *b, *to;
	struct counters *c;
	__u64 now;
	int len, why;

	if (skb->protocol != bpf_htons(ETH_P_IPV6) || bpf_skb_load_bytes(skb, l2, &o, sizeof(o)))
		return NEXT;
	if (!bpf_map_lookup_elem(&teps, &o.daddr))
		return NEXT;
	len = strip(skb, l2, &o);
	if (len == 0 && o.nexthdr != IPPROTO_FRAGMENT_)
		return NEXT;
	c = count(UP);
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!c || !cfg)
		return DROP;
	c->rx++;
	c->rx_bytes += skb->len - l2;
	if (len == 0) { /* a fragment: the stack puts it together */
		c->consumed++;
		return NEXT;
	}
	if (len < 0)
		return drop(c, -len);
	bytes = room(skb, l2, len, &o);
	if (!inner(skb, l2 + len, bytes, &ip))
		return drop(c, DROP_MALFORMED);
	if (expired())
		return drop(c, DROP_SESSION_EXPIRED);
	b = find(ip.saddr);
	if (!b)
		return drop(c, DROP_NO_BINDING);
	if (!same6(&b->host, &o.saddr))
		return drop(c, DROP_OUTER_SOURCE);
	if (!same6(&b->tep, &o.daddr))
		return drop(c, DROP_OUTER_DESTINATION);
	if (martian(ip.daddr))
		return drop(c, DROP_INNER_ADDRESS);
	now = bpf_ktime_get_boot_ns();
	if (now - b->last_seen > SECOND)
		b->last_seen = now;
	to = find(ip.daddr);
	/* What is too big for the other host goes to the kernel, which answers or fragments by the route of the binding. */
	if (to && (!(cfg->flags & FLAG_HAIRPIN) || fits(skb, l2 + len, &ip, to)))
		return hairpin(skb, c, cfg, l2, len, &ip, bytes, to);
	why = decap(skb, l2, len, &o, &ip);
	if (why)
		return drop(c, why);
	c->tx++;
	c->tx_bytes += bytes;
	return bpf_redirect(cfg->device, BPF_F_INGRESS);
}

SEC("tcx/ingress") int gateway_uplink_eth(struct __sk_buff *skb) { return uplink(skb, ETH_HLEN); }
SEC("tcx/ingress") int gateway_uplink_l3(struct __sk_buff *skb) { return uplink(skb, 0); }

SEC("tcx/egress") int gateway_device(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct counters *c = count(DOWN);
	struct config *cfg = bpf_map_lookup_elem(&config, &zero);
	struct in6_addr src, dst;
	struct binding *b;
	struct iphdr ip;

	if (!c || !cfg)
		return DROP;
	c->rx++;
	c->rx_bytes += skb->len;
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return drop(c, DROP_NOT_IPV4);
	if (!inner(skb, 0, skb->len, &ip))
		return drop(c, DROP_MALFORMED);
	if (expired())
		return drop(c, DROP_SESSION_EXPIRED);
	b = find(ip.daddr);
	if (!b)
		return drop(c, DROP_NO_BINDING);
	/* A leased source comes out of a tunnel, by way of the device; from anywhere else it is forged. */
	if (martian(ip.saddr) || (skb->ingress_ifindex != cfg->device && find(ip.saddr)))
		return drop(c, DROP_INNER_ADDRESS);
	if (!fits(skb, 0, &ip, b))
		return drop(c, DROP_TOO_BIG);
	src = b->tep;
	dst = b->host;
	return encap(skb, c, cfg, &ip, &src, &dst);
}

char _license[] SEC("license") = "Dual MIT/GPL";
