/* Fail static with three gateways and a member list that changes (rule F9 of docs/design/fencing-model.md).
 *
 * TEP 0 may be cut off from the lease service; W 0 and W 1 are the other gateways. TEP 0 asks those that are in the member list of
 * its last session reply. The service takes a W as witness against TEP 0 only if TEP 0 asks it, as far as the service can know.
 * W 1 joins and leaves the cell; W 0 always belongs to it. One entry of TEP 0 is to be fenced, at any time.
 * Checked: from when the service counts TEP 0 as fenced, TEP 0 does not forward for that entry.
 *
 * failstatic.pml has every message with its times; with three gateways that is too much. Here is what was taken out, and why
 * nothing is lost by that:
 *  - No clock: a deadline is the number of ticks that are left, the present one included; 0 = passed. An age stops
 *    growing where it is long enough. Time is unbounded. Clocks tick together (rates are fence.pml's).
 *  - "Echoes a reply that the service sent after L" is one bit, made when the reply is sent (L has passed by then) and
 *    taken away from everything under way when L moves: L then lies after every reply sent before.
 *  - A W gets session replies at any time, without having to ask, and its session ends by its own answers only. That
 *    makes more and longer sessions than there can be, so more witnesses.
 *  - A heartbeat of a W is under way only if it would count by itself; the others change nothing. One is enough: they differ in
 *    nothing else. A heartbeat or reply may arrive at any time later or never.
 *  - One heartbeat and one session reply of TEP 0 are under way, replaced by newer ones. Its stream is ordered, so an older reply
 *    does not come after a newer one (LASTLIST is about that). A reply that was replaced could only have made an earlier deadline.
 *  - TEP 0 does not lose the entry but by a reply that the service sends after the fence: the worst case of F7.
 *  - D, the end of every extension, is left out: without it TEP 0 lives longer.
 */
#ifndef d
#define d 1             /* ticks of a session lease, margin included */
#endif
#define FULL (d+1)
#ifndef VMAX
#define VMAX 1          /* versions of the member list; version 0 is "none" */
#endif
#ifndef FIRST
#define FIRST 1         /* W 1 is in version 1, and then in every second one */
#endif
#ifndef NQ
#define NQ 1            /* questions under way */
#endif
/* ---- TEP 0 ---- */
byte eff = 0;           /* ticks until the deadline of its packet path */
bool entry = 1;
byte tv = 0;            /* member list that it has */
byte ql[NQ]; byte qa[NQ];       /* questions: ticks left of question + d, 0 = none; who has still to answer (bits) */
byte hv = 0; byte hl = 0; byte hk = 0;  /* heartbeat: under way; ticks left of send + d; list that it echoes */
/* ---- the others ---- */
bool s[2]; byte age[2]; /* in a continuous session; for so many ticks */
bool ea[2];             /* got a reply that was sent after L */
bool wb[2];             /* heartbeat under way that makes a witness */
byte wr[2];             /* reply under way: 1 sent before L, 2 after */
/* ---- the service ---- */
byte L = 0;             /* ticks that TEP 0 may live by its session leases */
bool fenced = 0;
byte ver = 1;           /* member list now */
byte known = 0;         /* list of the newest reply that TEP 0 is known to have received */
byte sent = 0;          /* lists sent to it (bits by version) */
byte rv = 0; byte rl = 0; bool rf = 0;  /* reply to TEP 0: its list, 0 = none under way; ticks left; the entry is gone */

bool ALIVE = 0; bool REACHED = 0;

#define IN(v) (((v)+FIRST) % 2 == 0)                    /* W 1 is in version v */
#define MASK(v) (1 + (IN(v) -> 2 : 0))
#define LIVE (entry && eff > 0)
#if defined(ANYONE)     /* whoever has a session is a witness */
#define MAY 1
#elif defined(NEWEST)   /* in the newest list sent */
#define MAY (sent > 1 && ((sent & 8) -> IN(3) : ((sent & 4) -> IN(2) : IN(1))))
#elif defined(KNOWN)    /* in the list that TEP 0 is known to have, whatever was sent since */
#define MAY (known > 0 && IN(known))
#elif defined(ENDS)     /* in that one and in the newest */
#define MAY (known > 0 && IN(known) && ((sent & 8) -> IN(3) : ((sent & 4) -> IN(2) : IN(1))))
#else                   /* in that one and in every one sent since */
#define OUT(v) ((v) > known && (sent & (1<<(v))) && !IN(v))
#define MAY (known > 0 && IN(known) && !OUT(1) && !OUT(2) && !OUT(3))
#endif

#ifdef AFTERLAPSE       /* TEP 0 comes back by the others' silence after its deadline */
#define STILL 1
#else
#define STILL (eff > 0)
#endif
#ifdef NOECHO           /* a witness need not have heard of the service after L */
#define HEARD(w) 1
#else
#define HEARD(w) ea[w]
#endif
#if defined(NODURATION) /* a session of any length */
#define LONG(w) 1
#elif defined(NOMARGIN)
#define LONG(w) (age[w] >= d)
#else
#define LONG(w) (age[w] > d)
#endif

proctype tep() {
  do
  :: d_step { hv == 0 || hl < FULL || hk != tv -> hv = 1; hl = FULL; hk = tv }
  :: d_step { rv > 0 ->
       if :: rf -> entry = 0 :: else fi;                                    /* F7: first the table, then the deadline */
       if :: rl > eff -> eff = rl :: else fi;
#ifdef LASTLIST         /* also of an older reply that comes late */
       tv = rv;
#else
       if :: rv > tv -> tv = rv :: else fi;
#endif
       rv = 0; rl = 0; rf = 0 }
  :: d_step { rv > 0 -> rv = 0; rl = 0; rf = 0 }                            /* lost */
#ifdef LASTLIST
  :: d_step { tv > 1 && (sent & (1<<(tv-1))) -> tv = tv-1 }
#endif
#ifdef RESTART          /* of its process: the list is gone, the deadline is the kernel's */
  :: d_step { tv > 0 -> tv = 0; ql[0] = 0; qa[0] = 0; rv = 0; rl = 0; rf = 0
#if NQ > 1
       ; ql[1] = 0; qa[1] = 0
#endif
     }
#endif
  od }

#ifdef NOLIST           /* who knows no other gateway need not ask */
#define ASKED (tv > 0 -> MASK(tv) : 0)
#define HASLIST 1
#else
#define ASKED MASK(tv)
#define HASLIST (tv > 0)
#endif
#ifdef ATEXTEND         /* who has to have answered is read from the list when the deadline moves */
#define OPEN(q) (qa[q] & MASK(tv))
#else
#define OPEN(q) qa[q]
#endif
#ifdef RECEIPT          /* the extension counts from the answers */
#define UNTIL(q) FULL
#else
#define UNTIL(q) ql[q]
#endif
proctype ask(byte q) {
  do
  :: d_step { entry && STILL && HASLIST && ql[q] == 0 -> ql[q] = FULL; qa[q] = ASKED
#ifdef ATEXTEND
       ; qa[q] = 3      /* asks everybody it can reach; the list says whose answer counts */
#endif
     }
  :: d_step { ql[q] > 0 && OPEN(q) == 0 && STILL && HASLIST ->
       if :: UNTIL(q) > eff -> eff = UNTIL(q) :: else fi; ql[q] = 0; qa[q] = 0 }
  :: d_step { ql[q] > 0 -> ql[q] = 0; qa[q] = 0 }                           /* gives up, or somebody has a session */
  od }

#define BIT(w) (1<<(w))
#ifdef NORESET          /* "quiet" leaves the own session as it is */
#define QUIET(w)
#else
#define QUIET(w) s[w] = 0; age[w] = 0
#endif
proctype other(byte w) {
  do
  :: d_step { ql[0] > 0 && (qa[0] & BIT(w)) -> qa[0] = qa[0] - BIT(w); QUIET(w) }
#if NQ > 1
  :: d_step { ql[1] > 0 && (qa[1] & BIT(w)) -> qa[1] = qa[1] - BIT(w); QUIET(w) }
#endif
  /* session replies, as the service sends them and as they arrive */
  :: d_step { !fenced && wr[w] < (L == 0 -> 2 : 1) -> wr[w] = (L == 0 -> 2 : 1) }
  :: d_step { wr[w] > 0 -> s[w] = 1; if :: wr[w] == 2 -> ea[w] = 1 :: else fi; wr[w] = 0 }
  /* heartbeats */
  :: d_step { !fenced && !wb[w] && s[w] && HEARD(w) && LONG(w) -> wb[w] = 1 }
  :: d_step { wb[w] && (w == 0 || MAY) && !fenced -> fenced = 1;
       s[0] = 0; s[1] = 0; age[0] = 0; age[1] = 0; ea[0] = 0; ea[1] = 0; wb[0] = 0; wb[1] = 0; wr[0] = 0; wr[1] = 0 }
  :: d_step { wb[w] -> wb[w] = 0 }                                          /* lost, or no witness */
  od }

proctype service() {
  do
  :: d_step { hv == 1 ->
       L = FULL; if :: hk > known -> known = hk :: else fi;
       ea[0] = 0; ea[1] = 0; if :: wr[0] == 2 -> wr[0] = 1 :: else fi; if :: wr[1] == 2 -> wr[1] = 1 :: else fi;
#ifndef NOECHO
       wb[0] = 0; wb[1] = 0;
#endif
       rv = ver; rl = hl; rf = fenced; sent = sent | (1<<ver);
       hv = 0; hl = 0; hk = 0 }
  :: d_step { !fenced && ver < VMAX -> ver++ }                              /* W 1 joins or leaves */
#ifdef SVCRESTART       /* streams end; what was sent and heard is forgotten, and everybody gets a full lease */
  :: d_step { !fenced ->
#ifdef FORGETL
       L = 0;
#else
       L = FULL; ea[0] = 0; ea[1] = 0; wr[0] = 0; wr[1] = 0; wb[0] = 0; wb[1] = 0;
#endif
       known = 0; sent = 0; rv = 0; rl = 0; rf = 0; hv = 0; hl = 0; hk = 0 }
#endif
  od }

proctype clock() {
  do
  :: d_step { 1 ->
       if :: eff > 0 -> eff-- :: else fi; if :: L > 0 -> L-- :: else fi;
       if :: rl > 0 -> rl-- :: else fi; if :: hl > 0 -> hl-- :: else fi;
       if :: ql[0] == 1 -> ql[0] = 0; qa[0] = 0 :: ql[0] > 1 -> ql[0] = ql[0]-1 :: else fi;
#if NQ > 1
       if :: ql[1] == 1 -> ql[1] = 0; qa[1] = 0 :: ql[1] > 1 -> ql[1] = ql[1]-1 :: else fi;
#endif
       if :: s[0] && age[0] < FULL -> age[0] = age[0]+1 :: else fi;
       if :: s[1] && age[1] < FULL -> age[1] = age[1]+1 :: else fi }
  od }

#if defined(COVER1)     /* reachability: TEP 0 lives on the silence of two others, its session leases are over */
#define GOAL (LIVE && L == 0 && tv > 0 && IN(tv))
#elif defined(COVER2)   /* W 1, which joined later, is a witness: TEP 0 had its list and lived by it */
#define GOAL (!fenced && wb[1] && MAY && !wb[0] && !IN(1) && tv > 1 && known == tv && entry)
#elif defined(COVER3)   /* TEP 0 lives on the old list while a newer one is on its way */
#define GOAL (LIVE && L == 0 && tv > 0 && ver > tv && rv == ver)
#endif
proctype monitor() {
  do
#ifdef GOAL
  :: d_step { GOAL -> REACHED = 1; assert(!REACHED) }
#else
  :: d_step { fenced && LIVE -> ALIVE = 1; assert(!ALIVE) }
#endif
  od }

init { atomic { run tep(); run ask(0);
#if NQ > 1
  run ask(1);
#endif
  run other(0); run other(1); run service(); run clock(); run monitor() } }
