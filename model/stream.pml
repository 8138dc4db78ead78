/* DSTM: two addresses on one ordered stream (F3, F4, F7 of the fencing rules).
 * One TEP, one store whose revision is one per event; the generation of a binding is the revision of its bind. Batches
 * and snapshots travel in order within a session, or are lost; sessions end at any time (reconnect, crash of the daemon
 * with its table left in the kernel, reboot without). Messages of an ended session may still arrive.
 * Time is a global tick, as in fence.pml: the TEP counts D from its own heartbeat, the service D and a margin.
 * Checked: the TEP never forwards for an address by an older binding than one that was granted, and never lets go of a
 * binding that is in force. -D flags weaken one rule at a time, each as somebody might read it.
 */
#ifndef TMAX
#define TMAX 4
#endif
#ifndef RMAX
#define RMAX 5          /* events: binds and revocations of both addresses */
#endif
#define MAXS 2          /* sessions */
#define D 1
#define MARGIN 1
#define NA 2

#define FREE 0
#define BOUND 1
#define REVOKING 2

#define BATCH 1
#define SNAP 2

byte now = 0;
/* ---- durable store ---- */
byte rev = 0;
byte laddr[RMAX+1]; bool lbind[RMAX+1];        /* the events */
byte st[NA]; byte g[NA]; byte rrev[NA];        /* state, generation, revision of the revocation */
byte srvs = 0; byte srvdl = 0;                 /* newest session; deadline that the service has granted */
byte acked = 0; byte sent = 0;                 /* in that session */
bool wantsnap = 0;
/* ---- TEP ---- */
byte ts = 1; byte have = 0;
byte e[NA];                                    /* table of the packet path: generation, 0 = none */
byte dl = 0; bool dlset = 0;
bool fv = 0; byte ff = 0; byte fh = 0;         /* session reply that waits for the table: floor, heartbeat it answers */
/* ---- network: one ordered stream for each session, one message each way for the rest ---- */
chan down[MAXS] = [2] of { byte, byte, byte, byte, byte };  /* BATCH from,to | SNAP rev,gen0,gen1 */
bool hv = 0; byte hs = 0; byte hh = 0; byte hr = 0;         /* heartbeat: session, send time, have at the session's start */
bool rv = 0; byte rs = 0; byte rh = 0; byte rf = 0;         /* session reply: session, echoed send time, floor */
bool av = 0; byte as = 0; byte ar = 0;                      /* acknowledgement: session, applied revision */
byte crashes = 0;

#define LIVE (dlset && now <= dl)
/* letting go of a binding in force would cut a host off */
#define DELETE(a) assert(!(e[a] != 0 && e[a] == g[a] && st[a] == BOUND)); e[a] = 0

#ifdef F4GEN            /* "acknowledged its generation" instead of "acknowledged the revocation" */
#define ACKED(a) (acked >= g[a])
#else
#define ACKED(a) (acked >= rrev[a])
#endif
#ifdef F3GAP            /* newer is enough, contiguous is not asked for */
#define NEXT(from) ((from) > have)
#else
#define NEXT(from) ((from) == have+1)
#endif
#ifdef F3OLDSNAP        /* any snapshot is authoritative */
#define FRESH(r) 1
#else
#define FRESH(r) ((r) >= have)
#endif
#ifdef NOSESS           /* what an ended session had under way still counts */
#define MINE(i) 1
#define MYREPLY 1
#else
#define MINE(i) ((i)+1 == ts)
#define MYREPLY (rs == ts)
#endif

inline acknowledge(i) { av = 1; as = i+1; ar = have }

/* one record, in the order of the log */
inline apply(r) {
  a = laddr[r];
  if
  :: lbind[r] && r > e[a] -> e[a] = r
  :: !lbind[r] && e[a] != 0 && e[a] < r -> DELETE(a)
  :: else
  fi
}

inline receive(i) {
  down[i]?kind,x,y,z0,z1;
  if
  :: !MINE(i) -> skip
  :: MINE(i) && kind == BATCH && NEXT(x) ->
       r = x;
       do :: r <= y -> apply(r); r++ :: else -> break od;
       have = y; acknowledge(i)
  :: MINE(i) && kind == SNAP && FRESH(x) ->
#ifdef F3KEEP           /* a snapshot adds and never deletes */
       if :: z0 != 0 -> e[0] = z0 :: else fi;
       if :: z1 != 0 -> e[1] = z1 :: else fi;
#else
#ifdef F3GEN            /* a snapshot obeys the rule of single records: only a newer generation replaces */
       if :: z0 > e[0] -> e[0] = z0 :: else fi;
       if :: z1 > e[1] -> e[1] = z1 :: else fi;
#else
       if :: e[0] != z0 && z0 == 0 -> DELETE(0) :: else e[0] = z0 fi;
       if :: e[1] != z1 && z1 == 0 -> DELETE(1) :: else e[1] = z1 fi;
#endif
#endif
       have = x; acknowledge(i)
  :: MINE(i) && kind == BATCH && !NEXT(x) && ts < MAXS -> ts++; have = 0; fv = 0   /* doubt: a new session with a snapshot */
  :: else
  fi;
  kind = 0; x = 0; y = 0; z0 = 0; z1 = 0; r = 0; a = 0
}

proctype tep() {
  byte kind, x, y, z0, z1, r, a;
  do
  :: d_step { !hv || hh != now || hs != ts -> hv = 1; hs = ts; hh = now; hr = have }
  :: d_step { rv && MYREPLY -> fv = 1; ff = rf; fh = rh; rv = 0; rs = 0; rh = 0; rf = 0 }
  :: d_step { rv && !MYREPLY -> rv = 0; rs = 0; rh = 0; rf = 0 }
#ifdef F7NOWAIT         /* the deadline moves when the reply arrives */
  :: d_step { fv ->
#else
#ifdef F7PURGE          /* the floor read as a rule about generations */
  :: d_step { fv ->
       if :: e[0] != 0 && e[0] <= ff -> DELETE(0) :: else fi;
       if :: e[1] != 0 && e[1] <= ff -> DELETE(1) :: else fi;
#else
  :: d_step { fv && have >= ff ->
#endif
#endif
       if :: !dlset || dl < fh+D -> dl = fh+D; dlset = 1 :: else fi;
       fv = 0; ff = 0; fh = 0 }
  :: d_step { nempty(down[0]) -> receive(0) }
  :: d_step { nempty(down[1]) -> receive(1) }
  :: d_step { ts < MAXS -> ts++; fv = 0; ff = 0; fh = 0 }                                         /* reconnect: goes on by revision */
  :: d_step { crashes < 1 && ts < MAXS -> crashes++; ts++; have = 0; fv = 0; ff = 0; fh = 0 }     /* daemon: the table stays */
  :: d_step { crashes < 1 && ts < MAXS -> crashes++; ts++; have = 0; fv = 0; ff = 0; fh = 0; e[0] = 0; e[1] = 0; dl = 0; dlset = 0 }
  od }

inline bind(a) { rev++; laddr[rev] = a; lbind[rev] = 1; st[a] = BOUND; g[a] = rev; rrev[a] = 0 }
inline revoke(a) { rev++; laddr[rev] = a; lbind[rev] = 0; st[a] = REVOKING; rrev[a] = rev }

proctype service() {
  byte r;
  do
  /* heartbeat: deadline and floor in one transaction; a new session goes on where the TEP is, or gets a snapshot */
  :: d_step { hv && hs >= srvs && hs > 0 ->
       if :: hs > srvs -> srvs = hs; acked = 0; sent = hr; wantsnap = (hr == 0) :: else fi;
       if :: srvdl < now+D+MARGIN -> srvdl = now+D+MARGIN :: else fi;
       rv = 1; rs = hs; rh = hh; rf = rev;
       hv = 0; hs = 0; hh = 0; hr = 0 }
  :: d_step { srvs > 0 && wantsnap && nfull(down[srvs-1]) ->
       down[srvs-1]!SNAP,rev,0,(st[0]==BOUND -> g[0] : 0),(st[1]==BOUND -> g[1] : 0); sent = rev; wantsnap = 0 }
  :: d_step { srvs > 0 && !wantsnap && sent < rev && nfull(down[srvs-1]) -> down[srvs-1]!BATCH,sent+1,rev,0,0; sent = rev }
  :: d_step { srvs > 0 && !wantsnap && sent < rev -> sent = rev }                                 /* lost */
  :: d_step { av -> if :: as == srvs && ar > acked -> acked = ar :: else fi; av = 0; as = 0; ar = 0 }
  :: d_step { st[0] == FREE && rev < RMAX -> bind(0) }
  :: d_step { st[1] == FREE && rev < RMAX -> bind(1) }
  :: d_step { st[0] == BOUND && rev < RMAX -> revoke(0) }
  :: d_step { st[1] == BOUND && rev < RMAX -> revoke(1) }
  /* a TEP that never came needs no fence */
  :: d_step { st[0] == REVOKING && (srvs == 0 || ACKED(0) || now > srvdl) -> st[0] = FREE }
  :: d_step { st[1] == REVOKING && (srvs == 0 || ACKED(1) || now > srvdl) -> st[1] = FREE }
  od }

proctype clock() { do :: d_step { now < TMAX -> now++ } :: now == TMAX -> break od }

#if defined(COVER1)     /* reachability: a gap was noticed and the snapshot after it carried the second owner */
proctype monitor() { d_step { LIVE && ts == 2 && crashes == 0 && e[0] != 0 && e[0] == g[0] && g[0] >= 3 -> assert(0) } }
#elif defined(COVER2)   /* reachability: fenced by time; the old entry is in the table, dead, while the address has a new owner */
proctype monitor() { d_step { st[0] == BOUND && e[0] != 0 && e[0] < g[0] && !LIVE && ts == 1 -> assert(0) } }
#elif defined(COVER3)   /* reachability: both addresses in force at once */
proctype monitor() { d_step { LIVE && st[0] == BOUND && st[1] == BOUND && e[0] == g[0] && e[1] == g[1] && have == 4 -> assert(0) } }
#else
proctype monitor() { d_step {
  (LIVE && st[0] == BOUND && e[0] != 0 && e[0] < g[0]) || (LIVE && st[1] == BOUND && e[1] != 0 && e[1] < g[1]) -> assert(0) } }
#endif
init { atomic { run tep(); run service(); run clock(); run monitor() } }
