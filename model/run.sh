#!/usr/bin/env bash
# Checks the fencing models: the rules hold, the states that matter are reached, and each weakened version gives its
# counter-example. Needs spin and gcc. usage: run.sh [PATTERN]; with PATTERN only checks whose line matches it.
# Exit 0 only if every result is as expected. What the checks mean: docs/design/fencing-model.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pattern=${1:-.}
limit=600 # seconds for one check; the longest takes a minute on a quiet machine
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
ran=0 bad=0

# check MODEL EXPECTED NAME FLAGS...: EXPECTED is "holds" or the assertion that has to be violated. A model that deadlocks
# is no counter-example (pan -E): bounded models come to rest.
check() {
  local model=$1 want=$2 name=$3 got=unfinished states begin=$SECONDS
  shift 3
  grep -qE -- "$pattern" <<<"$model $want $name $*" || return 0
  rm -f pan ./*.trail
  if ! { spin "$@" -a "$here/$model.pml" && gcc -O1 -w -DSAFETY -DCOLLAPSE -DMEMLIM=6000 -o pan pan.c; } >build 2>&1; then
    cat build
    got="no build"
  else
    timeout "$limit" ./pan -E -m400000 -w24 >out 2>&1 || true
    if grep -qE 'errors: 0$' out && ! grep -qE 'Search not completed|search depth too small|out of memory' out; then
      got=holds
    elif grep -q 'assertion violated' out; then
      got=$(sed -n 's/.*assertion violated *!*(*\([A-Z0-9]*\)).*/\1/p' out | head -1)
    fi
  fi
  states=$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' out | head -1)
  ran=$((ran + 1))
  local verdict=ok
  if [ "$got" != "$want" ]; then
    verdict=FAIL bad=$((bad + 1))
  fi
  printf '%-4s %-10s %-48s expected %-8s got %-8s %8s states %3ss\n' \
    "$verdict" "$model" "$name" "$want" "$got" "${states:-0}" $((SECONDS - begin))
}

one=(-DONETEP -DTMAX=5)
check fence holds   "rules"                                    "${one[@]}"
check fence holds   "rules, service crash"                     "${one[@]}" -DCRASH
check fence holds   "rules, late reply packets"                "${one[@]}" -DLATE
check fence holds   "rules, deadlines in memory"               -DONETEP -DTMAX=4 -DCRASH -DVOLATILEDL
check fence REACHED "both TEPs forward for the new client"     -DTMAX=3 -DCOVER1
check fence REACHED "fenced by time"                           "${one[@]}" -DCOVER2
check fence REACHED "forwards after an acknowledged revoke"    "${one[@]}" -DCOVER3
for m in NOACK NOGEN NODEADLINE RELTTL NOREV OLDFLOOR REPLYFIRST NOSESS; do
  check fence I4 "weakened: $m" "${one[@]}" -D$m
done
check fence I4      "weakened: no margin for rates"            "${one[@]}" -DMARGIN=0
check fence I4      "weakened: FORGETDL"                       "${one[@]}" -DCRASH -DFORGETDL
check fence I6      "weakened: no hold-down"                   "${one[@]}" -DLATE -DQ=0
check fence I6      "weakened: FORGETHOLD"                     "${one[@]}" -DLATE -DCRASH -DFORGETHOLD
check fence I4      "weakened: ONEACK, two TEPs"               -DTMAX=3 -DONEACK

check stream holds   "rules"
check stream holds   "rules, 7 revisions"                      -DRMAX=7
check stream holds   "rules, longer deadlines"                 -DD=2
check stream holds   "rules, restore of a backup"              -DRESTORE -DRMAX=4
check stream holds   "acknowledgements of old sessions count"  -DACKOLD
check stream holds   "old snapshots, no process ever dies"     -DNOSESS -DNOCRASH
check stream REACHED "second owner after acknowledgement"      -DCOVER1
check stream REACHED "fenced by time"                          -DCOVER2
check stream REACHED "back, and waits for the floor"           -DCOVER3
check stream REACHED "new process over a table that forwards"  -DCOVER4
check stream REACHED "gap, snapshot, second owner"             -DCOVER5
check stream REACHED "restore: older generation in a snapshot" -DRESTORE -DRMAX=4 -DCOVER6
check stream I7      "weakened: F2 BYDAEMON"                   -DBYDAEMON
check stream I8      "weakened: F3 GAP"                        -DGAP
check stream I4      "weakened: F3 GAP"                        -DGAP -DNOI8
check stream I8      "weakened: F3 MERGE"                      -DMERGE
check stream I4      "weakened: F3 MERGE"                      -DMERGE -DNOI8
check stream I4      "weakened: F3 OLDSNAP, no process dies"   -DOLDSNAP -DNOCRASH
check stream I4      "weakened: F3 NOSESS"                     -DNOSESS
check stream I8      "weakened: F3 SNAPGEN, restore"           -DSNAPGEN -DRESTORE -DRMAX=4
check stream I4      "weakened: F4 ACKGEN"                     -DACKGEN
check stream I4      "weakened: F4 ACKSENT"                    -DACKSENT
check stream I7      "weakened: F4 LATEJOIN"                   -DLATEJOIN
check stream I7      "weakened: F5 RECEIPT"                    -DRECEIPT
check stream I4      "weakened: F7 NOWAIT"                     -DNOWAIT
check stream I8      "weakened: F7 PURGE"                      -DPURGE
check stream I4      "weakened: F7 PURGE"                      -DPURGE -DNOI8
check stream I8      "weakened: SAMEEPOCH, restore"            -DRESTORE -DRMAX=4 -DSAMEEPOCH
check stream I4      "weakened: SAMEEPOCH, restore"            -DRESTORE -DRMAX=4 -DSAMEEPOCH -DNOI8
check stream I4      "weakened: FREEBACK, restore"             -DRESTORE -DRMAX=4 -DFREEBACK

check failstatic holds   "rules"                               -DTMAX=4
check failstatic REACHED "lives on the silence of the other"   -DTMAX=4 -DCOVER1
check failstatic REACHED "fenced by a witness after that"      -DTMAX=4 -DCOVER2
for m in NORESET AFTERLAPSE RECEIPT NOECHO NODURATION NOMARGIN; do
  check failstatic ALIVE "weakened: $m" -DTMAX=4 -D$m
done

joins=(-DFIRST=0 -DVMAX=2) # version 1 of the list is {W 0}, version 2 {W 0, W 1}
leaves=(-DFIRST=1 -DVMAX=2) # version 1 {W 0, W 1}, version 2 {W 0}
check members holds   "rules, list stays"
check members holds   "rules, list stays, longer leases"       -Dd=2
check members holds   "rules, list stays, two questions"       -DNQ=2
check members holds   "rules, W 1 joins, leaves"               -DFIRST=0 -DVMAX=3
check members holds   "rules, W 1 leaves, joins"               -DFIRST=1 -DVMAX=3
check members holds   "rules, who must answer: list at the end" "${leaves[@]}" -DATEXTEND
check members holds   "rules, TEP 0 and service restart"       "${joins[@]}" -DRESTART -DSVCRESTART
check members REACHED "lives on the silence of two others"     -DCOVER1
check members REACHED "a witness that joined later"            "${joins[@]}" -DCOVER2
check members REACHED "old list, the new one under way"        "${joins[@]}" -DCOVER3
for m in NORESET AFTERLAPSE RECEIPT NOECHO NODURATION NOMARGIN; do
  check members ALIVE "weakened: $m" -D$m
done
check members ALIVE   "weakened: ANYONE, witness not in the list" -DFIRST=0 -DANYONE
check members ALIVE   "weakened: NEWEST, W 1 joins"            "${joins[@]}" -DNEWEST
check members ALIVE   "weakened: KNOWN, W 1 leaves"            "${leaves[@]}" -DKNOWN
check members ALIVE   "weakened: ENDS, W 1 leaves, joins"      -DFIRST=1 -DVMAX=3 -DENDS
check members ALIVE   "weakened: LASTLIST, W 1 joins"          "${joins[@]}" -DLASTLIST
check members ALIVE   "weakened: NOLIST, TEP 0 restarts"       -DRESTART -DNOLIST
check members ALIVE   "weakened: FORGETL, service restarts"    -DSVCRESTART -DFORGETL

echo "$ran checks, $bad not as expected, ${SECONDS}s"
[ "$ran" -gt 0 ] && [ "$bad" = 0 ]
