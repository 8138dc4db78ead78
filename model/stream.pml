/* Fencing, second model: two addresses on one ordered stream of revisions (rules F3, F4, F7 of docs/design/fencing-model.md).
 *
 * One lease service, one gateway (TEP), addresses 0 and 1. Every bind and revoke takes the next revision; the generation of a
 * binding is the revision of its bind. A revision, an acknowledgement and a floor say something about both addresses at once,
 * and a floor is no generation: that is what one address alone cannot show.
 *
 * What is left out, and why nothing is lost by that:
 *  - One gateway. Rules F3 and F7 concern one gateway; F4 asks every gateway, so others only delay (fence.pml has two).
 *  - No channel. What a batch or a snapshot holds depends on its revision alone, so one that was sent long ago and arrives
 *    now is one that arrives now with an old revision: the step that receives may take any revision that could be on its
 *    way in this session. That is the ordered stream with any delay and any capacity. A loss is a gap; see "doubt".
 *  - Batches of one revision. A longer one passes through the same tables; only a crash in its middle can leave another
 *    mixture, and that is a step of its own ("half done").
 *  - Acknowledgements, heartbeats and Hellos arrive at once. A late acknowledgement only lets the service do later what it could
 *    have done before (the packet path never goes back behind what it acknowledged: that is what is checked). A late
 *    heartbeat makes the gateway's deadline earlier than the service's; fence.pml has those, and clock rates.
 *  - One session reply under way; it waits for its floor in place, and may be lost or replaced at any time. Deadlines are a
 *    maximum and nothing else reads them, so in a run that ends badly every reply but the one that made the last deadline
 *    can be dropped.
 *  - No clock: a deadline is the number of ticks that are left, the present one included; 0 = passed. Time is unbounded, and
 *    so are sessions, crashes and reboots. Only revisions are bounded.
 *  - Addresses go from REVOKING to FREE without hold-down; HOLD only waits (fence.pml has it). A bind is acknowledged to its
 *    client in the step that commits it, the earliest moment there is.
 *  - What ended sessions left under way is in NOSESS only: the rule is that it is ignored, which changes nothing.
 *
 * Checked in every state:
 *  I4  the gateway forwards for no address by an older binding than the newest that a client was told of
 *  I7  it forwards nothing after its deadline, and its deadline never passes after the service's
 *  I8  a whole table at revision R is the service's table at R, so no lease in force is missing either
 *
 * -D flags: see run.sh for those that read a rule wrongly and those that change the world.
 */
#ifndef RMAX
#define RMAX 6          /* revisions, 7 at most */
#endif
#ifndef D
#define D 1             /* ticks that a session reply grants */
#endif
#define FULL (D+1)
#ifndef EP
#define EP 16           /* a generation of the second epoch, after a restore, is EP + revision */
#endif

#define FREE 0
#define BOUND 1
#define REVOKING 2

/* ---- the service, durable ---- */
byte rev = 0;
byte tab[16];                   /* its table at each revision: generations, 0 = no binding */
#define TAB(a,r) tab[(a)*8+(r)]
byte st[2];
byte g[2];                      /* highest generation that a client was told of */
byte rrev[2];                   /* REVOKING: revision of the revoke */
byte sl = 0;                    /* ticks until the gateway is fenced by time */
/* ---- the gateway ---- */
bool up = 0;                    /* a session runs */
byte base = 0;                  /* newest revision when it began: its snapshot is not older */
byte have = 0;                  /* applied revision */
bool whole = 1;                 /* only a snapshot helps: new process, or doubt */
byte e[2];                      /* table of the packet path */
byte dl = 0;                    /* ticks until its deadline */
/* ---- under way ---- */
byte rl = 0;                    /* session reply: ticks that are left of its deadline, 0 = none */
byte rf = 0;                    /* its floor */
/* ---- names for what must not happen ---- */
bool I4 = 0; bool I7 = 0; bool I8 = 0; bool REACHED = 0;

#ifdef BYDAEMON         /* F2: the deadline is watched by the daemon, not by the packet path */
bool dead = 0;
#define DEAD dead
#define RUNS (dl > 0 || dead)
#else
#define DEAD 0
#define RUNS (dl > 0)
#endif

#ifdef ACKGEN           /* F4: acknowledging the generation is taken for acknowledging its revoke */
#define NEED(a) g[a]
#else
#define NEED(a) rrev[a]
#endif
#if defined(ACKSENT)    /* F4: sent counts as acknowledged */
#define ACKED(a) (up)
#elif defined(ACKOLD)   /* F4: what earlier sessions acknowledged counts */
byte acked = 0;
#define ACKED(a) (acked >= NEED(a))
#else
#define ACKED(a) (up && !whole && have >= NEED(a))
#endif

#if defined(OLDSNAP)    /* F3: any snapshot is authoritative */
#define FRESH(R) 1
#elif defined(NOSESS)   /* F3: a snapshot that an earlier session sent is taken */
#define FRESH(R) ((R) >= have)
#else
#define FRESH(R) ((R) >= have && (R) >= base)
#endif

#if defined(MERGE)      /* F3: a snapshot adds and replaces, it does not delete the rest */
#define INSTALL(a,R) if :: TAB(a,R) != 0 -> e[a] = TAB(a,R) :: else fi
#elif defined(SNAPGEN)  /* F3: a snapshot obeys the rule of single records, only a newer generation replaces */
#define INSTALL(a,R) if :: TAB(a,R) == 0 || TAB(a,R) > e[a] -> e[a] = TAB(a,R) :: else fi
#else
#define INSTALL(a,R) e[a] = TAB(a,R)
#endif

#ifdef COVER6           /* reachability: a snapshot puts an older generation in the place of a newer one, after a restore */
#define SEEN(R) if :: TAB(0,R) != 0 && TAB(0,R) < e[0] -> REACHED = 1; assert(!REACHED) :: else fi
#else
#define SEEN(R)
#endif
#ifdef COVER5
bool gap = 0;
#define MISSED gap = 1
#else
#define MISSED
#endif

/* The record of address a at revision r, as Replica.take has it: one that contradicts the table is a reason for doubt. */
inline record(a, r) {
  if
  :: TAB(a,r) != 0 && TAB(a,r) != TAB(a,(r)-1) -> if :: e[a] < TAB(a,r) -> e[a] = TAB(a,r) :: else -> whole = 1 fi
  :: TAB(a,r) == 0 && TAB(a,(r)-1) != 0 -> if :: e[a] <= TAB(a,(r)-1) -> e[a] = 0 :: else -> whole = 1 fi
  :: else
  fi
}

#define EACH(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
/* Steps for a revision from the stream: a snapshot at R; a process that dies when what leads to R is half applied. */
#define AT(R) \
  :: d_step { up && (R) <= rev && FRESH(R) && (whole || (R) > have || e[0] != TAB(0,R) || e[1] != TAB(1,R)) -> \
       SEEN(R); INSTALL(0,R); INSTALL(1,R); have = (R); whole = 0 }
#define HALF(R) \
  :: d_step { up && (R) <= rev && (FRESH(R) || (!whole && (R) > have)) && e[0] != TAB(0,R) -> INSTALL(0,R); die() } \
  :: d_step { up && (R) <= rev && (FRESH(R) || (!whole && (R) > have)) && e[1] != TAB(1,R) -> INSTALL(1,R); die() }
/* F3 GAP: a record behind a gap. */
#define BEHIND(R) \
  :: d_step { up && !whole && (R) <= rev && (R) > have+1 -> record(0, R); record(1, R); have = (R) }

inline leave() { up = 0; base = 0; rl = 0; rf = 0 }         /* the stream ends, and what it had under way with it */
inline die() { leave(); have = 0; whole = 1 }               /* the process; table and deadline are the kernel's */

proctype tep() {
  do
  /* session reply: the deadline moves when everything up to the floor is in the table */
#if defined(NOWAIT)     /* F7: the floor is noted, not waited for */
  :: d_step { rl > 0 ->
#elif defined(PURGE)    /* F7: instead of waiting, what is below the floor is deleted */
  :: d_step { rl > 0 && !whole ->
       if :: e[0] <= rf -> e[0] = 0 :: else fi; if :: e[1] <= rf -> e[1] = 0 :: else fi;
#else
  :: d_step { rl > 0 && !whole && have >= rf ->
#endif
#ifdef RECEIPT          /* F5: counted from the receipt */
       rl = FULL;
#endif
       if :: dl < rl -> dl = rl :: else fi; rl = 0; rf = 0 }
  :: d_step { rl > 0 -> rl = 0; rf = 0 }                                    /* lost */
  /* records in order */
  :: d_step { up && !whole && have < rev -> have++; record(0, have); record(1, have) }
  AT(0) EACH(AT)
#ifdef GAP              /* F3: newer is enough, contiguous is not asked for */
  EACH(BEHIND)
#endif
  /* doubt: a batch that does not follow, a record that contradicts, a digest that differs */
  :: d_step { up && !whole -> whole = 1; MISSED }
  /* sessions */
  :: d_step { up -> leave() }
#ifndef NOCRASH
  EACH(HALF)
  :: d_step { have > 0 || up -> die() }
  :: d_step { e[0] != 0 || e[1] != 0 || dl > 0 -> die(); e[0] = 0; e[1] = 0; dl = 0 }  /* the machine */
#endif
#ifdef BYDAEMON
  :: d_step { !dead && dl > 0 -> die(); dead = 1 }
  :: d_step { dead -> dead = 0 }
#endif
  od }

/* Deadline and floor are made in one transaction, see OLDFLOOR of fence.pml. */
inline reply() { sl = FULL; rl = FULL; rf = rev }
#ifdef LATEJOIN         /* F4: a gateway joins the fence set after the answer to its Hello */
#define HELLO rl = FULL; rf = rev
#else
#define HELLO reply()
#endif
inline commit() { rev++; TAB(0,rev) = TAB(0,rev-1); TAB(1,rev) = TAB(1,rev-1) }
#ifdef RESTORE
/* One backup, one restore: what happened between is forgotten, and generations go on in the next epoch (I3). The gateway finds
 * another epoch in its next session and starts from nothing. I4 speaks of the history that is left: a client that was told
 * of a binding that the backup does not know has lost it. */
byte bk = 0;                    /* 1 = backup taken, 2 = restored */
byte bst[2]; byte bg[2]; byte brev = 0;
#define GEN(r) ((r) + (bk == 2 -> EP : 0))
#define RETURN(a) \
  if \
  :: bst[a] == BOUND -> st[a] = BOUND; g[a] = bg[a]; rrev[a] = 0 \
  :: else -> BACK(a) \
  fi
#ifdef FREEBACK         /* what was free in the backup is free */
#define BACK(a) st[a] = bst[a]; rrev[a] = (st[a] == REVOKING -> brev : 0)
#else                   /* it may have been bound since, and a gateway may forward for it: it has to be fenced */
#define BACK(a) st[a] = REVOKING; rrev[a] = brev
#endif
#ifdef SAMEEPOCH        /* the copy is put in place, and the gateway goes on where it was */
#define NEWEPOCH
#else
#define NEWEPOCH have = 0; whole = 1;
#endif
#else
#define GEN(r) (r)
#endif
inline bind(a) { commit(); TAB(a,rev) = GEN(rev); g[a] = GEN(rev); st[a] = BOUND }
inline revoke(a) { commit(); TAB(a,rev) = 0; st[a] = REVOKING; rrev[a] = rev }

proctype service() {
  byte r;
  do
  :: d_step { !up && !DEAD -> up = 1; base = rev; HELLO }                   /* Hello */
  :: d_step { up && (sl < FULL || rl < FULL || rf < rev) -> reply() }       /* heartbeat */
  :: d_step { up && sl < FULL -> sl = FULL }                                /* and its reply is lost */
  :: d_step { st[0] == FREE && rev < RMAX -> bind(0) }
  :: d_step { st[1] == FREE && rev < RMAX -> bind(1) }
  :: d_step { st[0] == BOUND && rev < RMAX -> revoke(0) }
  :: d_step { st[1] == BOUND && rev < RMAX -> revoke(1) }
  :: d_step { st[0] == REVOKING && (ACKED(0) || sl == 0) -> st[0] = FREE; rrev[0] = 0 }
  :: d_step { st[1] == REVOKING && (ACKED(1) || sl == 0) -> st[1] = FREE; rrev[1] = 0 }
#ifdef ACKOLD
  :: d_step { up && !whole && acked < have -> acked = have }
#endif
#ifdef RESTORE
  :: d_step { bk == 0 -> bk = 1; brev = rev; bst[0] = st[0]; bst[1] = st[1]; bg[0] = TAB(0,rev); bg[1] = TAB(1,rev) }
  :: d_step { bk == 1 && brev < rev -> bk = 2;
       r = brev+1; do :: r <= rev -> TAB(0,r) = 0; TAB(1,r) = 0; r++ :: else -> break od; r = 0;
       rev = brev; RETURN(0); RETURN(1);
       sl = FULL;                                                           /* as after every restart */
       leave(); NEWEPOCH
       bst[0] = 0; bst[1] = 0; bg[0] = 0; bg[1] = 0; brev = 0 }
#endif
  od }

proctype clock() {
  do
  :: d_step { sl > 0 || dl > 0 || rl > 0 ->
       if :: sl > 0 -> sl-- :: else fi; if :: dl > 0 -> dl-- :: else fi; if :: rl > 0 -> rl-- :: else fi;
       if :: rl == 0 -> rf = 0 :: else fi }
  od }

#define OLDER(a) (e[a] != 0 && e[a] < g[a])
#define FORWARDS (RUNS && (e[0] != 0 || e[1] != 0))
#if defined(COVER1)     /* the second owner of address 0 forwards, the first was fenced by acknowledgement; address 1 was there all along */
#define GOAL (RUNS && sl > 0 && st[0] == BOUND && st[1] == BOUND && e[0] == g[0] && e[1] == g[1] && g[1] == 1 && g[0] > 3)
#elif defined(COVER2)   /* fenced by time: the first owner's entry is in the table, dead, while the address has a new owner */
#define GOAL (!RUNS && st[0] == BOUND && OLDER(0))
#elif defined(COVER3)   /* the gateway is back after that, and its reply waits for the floor */
#define GOAL (!RUNS && st[0] == BOUND && OLDER(0) && up && !whole && rl > 0 && have < rf)
#elif defined(COVER4)   /* a new process, its table forwards, and the snapshot will delete something */
#define GOAL (RUNS && up && whole && have == 0 && e[0] != 0 && TAB(0,base) == 0 && base > 1)
#elif defined(COVER5)   /* after a gap a snapshot brought the second owner */
#define GOAL (gap && RUNS && !whole && OLDER(0) == 0 && e[0] == g[0] && g[0] > 2)
#elif defined(COVER6) || defined(COVER)
#define GOAL 0
#endif
proctype monitor() {
  do
#ifdef GOAL
  :: d_step { GOAL -> REACHED = 1; assert(!REACHED) }
#else
#ifndef NOI4
  :: d_step { RUNS && (OLDER(0) || OLDER(1)) -> I4 = 1; assert(!I4) }
#endif
  :: d_step { dl > sl || (FORWARDS && dl == 0) -> I7 = 1; assert(!I7) }
#ifndef NOI8            /* so that a weakened version goes on to what it does to I4 */
  :: d_step { !whole && (e[0] != TAB(0,have) || e[1] != TAB(1,have)) -> I8 = 1; assert(!I8) }
#endif
#endif
  od }

init { atomic { run tep(); run service(); run clock(); run monitor() } }
