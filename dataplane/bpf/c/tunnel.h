/* SPDX-License-Identifier: Apache-2.0 */
/* Taking the outer header off and putting it on (RFC 2473), with ECN (RFC 6040). */
#ifndef DSTM_TUNNEL_H
#define DSTM_TUNNEL_H

#include "dstm.h"

/* ignorable says whether every option of an 8-byte header may be skipped by who does not know it (RFC 8200 section
 * 4.2): the two highest bits of its type are 0, as those of the tunnel encapsulation limit (RFC 2473 section 4.1.1) are.
 * Returns 0 or a drop reason. */
static __always_inline int ignorable(const __u8 *opt)
{
	int want = 0, value = 0; /* want: the next byte is a length; value: bytes of the option still to come */

	for (int i = 2; i < 8; i++) {
		if (value) {
			value--;
		} else if (want) {
			value = opt[i];
			want = 0;
		} else if (opt[i] >> 6) {
			return DROP_OPTION;
		} else {
			want = opt[i] != 0; /* Pad1 has no length */
		}
	}
	return want || value ? DROP_MALFORMED : 0;
}

/* strip returns how many bytes stand in front of the inner packet, 0 when this is no tunnel packet, or a negative drop
 * reason. A destination options header is taken when it is 8 bytes long, as Linux's ip6tnl sends it. */
static __always_inline int strip(struct __sk_buff *skb, __u32 l2, const struct ipv6hdr *o)
{
	__u8 opt[8];
	int why;

	if (o->nexthdr == IPPROTO_IPIP)
		return OUTER;
	if (o->nexthdr != IPPROTO_DSTOPTS_)
		return 0;
	if (bpf_skb_load_bytes(skb, l2 + OUTER, opt, sizeof(opt)))
		return -DROP_MALFORMED;
	if (opt[0] != IPPROTO_IPIP)
		return 0;
	why = opt[1] ? DROP_OPTION : ignorable(opt);
	return why ? -why : OUTER + 8;
}

/* room returns how many bytes the outer header leaves to the inner packet behind the first `len`, 0 when the outer
 * packet is cut short. What stands in the frame behind the payload is nobody's. The lengths of a super-packet are
 * written by segmentation. */
static __always_inline __u32 room(struct __sk_buff *skb, __u32 l2, __u32 len, const struct ipv6hdr *o)
{
	__u32 end = OUTER + bpf_ntohs(o->payload_len);

	if (skb->gso_size)
		end = skb->len - l2;
	return end < len || end > skb->len - l2 ? 0 : end - len;
}

/* inner reads the IPv4 header at `at` and says whether a whole packet of it fits in `bytes` (RFC 791 section 3.1). */
static __always_inline int inner(struct __sk_buff *skb, __u32 at, __u32 bytes, struct iphdr *ip)
{
	__u32 len;

	if (bpf_skb_load_bytes(skb, at, ip, sizeof(*ip)) || ip->version != 4 || ip->ihl < 5)
		return 0;
	len = bpf_ntohs(ip->tot_len);
	return skb->gso_size || (len >= ip->ihl * 4 && len <= bytes);
}

static __always_inline int set_tos(struct __sk_buff *skb, __u32 at, const struct iphdr *ip, __u8 tos)
{
	__be16 old = bpf_htons(0x4500 | ip->tos), new = bpf_htons(0x4500 | tos);

	if (bpf_l3_csum_replace(skb, at + 10, old, new, 2))
		return -1;
	return bpf_skb_store_bytes(skb, at + 1, &tos, 1, 0);
}

/* decap removes the outer header. The inner packet then stands behind the link header, with the ECN field of RFC 6040
 * figure 4. Returns 0 or a drop reason. */
static __always_inline int decap(struct __sk_buff *skb, __u32 l2, int len, const struct ipv6hdr *o,
				 const struct iphdr *ip)
{
	__u8 oe = (bpf_ntohl(*(__be32 *)o) >> 20) & 3, ie = ip->tos & 3, tos = ip->tos;

	if (oe == 3) {
		if (ie == 0)
			return DROP_ECN;
		tos |= 3;
	} else if (oe == 1 && ie == 2) {
		tos = (tos & ~3) | 1;
	}
	if (bpf_skb_adjust_room(skb, -len, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_DECAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO))
		return DROP_INTERNAL;
	if (l2) {
		__be16 proto = bpf_htons(ETH_P_IP);
		if (bpf_skb_store_bytes(skb, 12, &proto, 2, 0))
			return DROP_INTERNAL;
	}
	if (tos != ip->tos && set_tos(skb, l2, ip, tos))
		return DROP_INTERNAL;
	return 0;
}

/* label hashes the inner 5-tuple into 20 bits (RFC 6438). Fragments have no ports, so that all of one packet match. */
static __always_inline __u32 label(struct __sk_buff *skb, const struct iphdr *ip)
{
	__u32 ports = 0, h;

	if (!(ip->frag_off & bpf_htons(0x3fff)) &&
	    (ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_UDP || ip->protocol == IPPROTO_SCTP))
		bpf_skb_load_bytes(skb, ip->ihl * 4, &ports, 4);
	h = ip->saddr * 0x9e3779b1 ^ ip->daddr * 0x85ebca6b ^ ports * 0xc2b2ae35 ^ ip->protocol;
	h ^= h >> 15;
	h *= 0x2c1b3c6d;
	h ^= h >> 12;
	return h & 0xfffff;
}

/* output sends an IPv6 packet on the way that routing has for its destination. `device` is the interface in whose
 * forwarding context we ask. The link header must be there; it does not count for the MTU, so that the length is given
 * to the look-up. The segments of a super-packet fit the TUN already. Returns a verdict. */
static __always_inline int output(struct __sk_buff *skb, struct counters *c, __u32 device, const struct in6_addr *src,
				  const struct in6_addr *dst, __u32 len)
{
	struct bpf_fib_lookup f = {};
	long rc;

	f.family = AF_INET6;
	f.ifindex = device;
	f.tot_len = skb->gso_size ? 0 : skb->len - ETH_HLEN;
	__builtin_memcpy(f.ipv6_src, src, sizeof(*src));
	__builtin_memcpy(f.ipv6_dst, dst, sizeof(*dst));
	rc = bpf_fib_lookup(skb, &f, sizeof(f), BPF_FIB_LOOKUP_OUTPUT);
	if (rc == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return drop(c, DROP_TOO_BIG);
	if (rc != BPF_FIB_LKUP_RET_SUCCESS && rc != BPF_FIB_LKUP_RET_NO_NEIGH)
		return drop(c, DROP_NO_ROUTE);
	c->tx++;
	c->tx_bytes += len;
	return bpf_redirect_neigh(f.ifindex, NULL, 0, 0);
}

/* encap puts an outer header in front of the IPv4 packet that leaves the TUN, and sends it. */
static __always_inline int encap(struct __sk_buff *skb, struct counters *c, const struct config *cfg,
				 const struct iphdr *ip, const struct in6_addr *src, const struct in6_addr *dst)
{
	struct ipv6hdr o = {};
	__u32 len = skb->len;
	__be16 proto = bpf_htons(ETH_P_IPV6);

	*(__be32 *)&o = bpf_htonl(6u << 28 | (__u32)ip->tos << 20 | label(skb, ip));
	o.payload_len = bpf_htons(len); /* of a super-packet too: segmentation rewrites it */
	o.nexthdr = IPPROTO_IPIP;
	o.hop_limit = cfg->hop_limit;
	o.saddr = *src;
	o.daddr = *dst;
	if (bpf_skb_adjust_room(skb, OUTER, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_FIXED_GSO) ||
	    bpf_skb_store_bytes(skb, 0, &o, sizeof(o), 0) ||
	    bpf_skb_change_head(skb, ETH_HLEN, 0) ||
	    bpf_skb_store_bytes(skb, 12, &proto, 2, 0))
		return drop(c, DROP_INTERNAL);
	return output(skb, c, cfg->device, src, dst, len);
}

#endif
