# What the scripts beside it share; to be sourced. Each runs an unmodified qemu-system-x86_64 under libnptl.so in the
# modes that are its arguments (both, if none), checks what it claims, and fails where that is not so. Nothing that the
# whole machine shares is changed. NPTL_QEMU_ACCEL=kvm or =tcg takes the choice of the accelerator away from it.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
library=${NPTL_LIBRARY:-${CARGO_TARGET_DIR:-$top/target}/release/libnptl.so}
script=$(basename "$0" .sh)
modes=("$@")
[ $# -gt 0 ] || modes=(explain threads)
ulimit -S -c 0

skip() {
  echo "skipped: qemu/$script: $1"
  exit 0
}

fail() {
  echo "FAILED: qemu/$script: $mode: $1" >&2
  tail -n 40 "$work"/*.err >&2 2>/dev/null || true
  exit 1
}

passed() {
  echo "qemu/$script: $mode: $1"
}

# A process of ours, a cgroup and a directory, and nothing else, can be left.
work=$(mktemp -d "${TMPDIR:-/tmp}/nptl-test-qemu-XXXXXX")
holder= cgroup= mode=
machines=()

# forget_machines: ends every QEMU that still runs, and the pid namespace.
forget_machines() {
  [ -z "${machines[*]}$holder" ] || kill -KILL "${machines[@]}" $holder 2>/dev/null || true
  wait 2>/dev/null || true
  machines=() holder=
}

clean_up() {
  local status=$?
  trap - EXIT
  # What bash says of a killed job is no news.
  exec 2>/dev/null
  forget_machines
  # The kernel lets a cgroup go a moment after its last process.
  if [ -n "$cgroup" ]; then
    for _ in {1..100}; do
      rmdir "$cgroup" && break
      sleep 0.05
    done
  fi
  rm -rf "$work"
  exit $status
}
trap clean_up EXIT
trap 'exit 1' INT TERM HUP

command -v qemu-system-x86_64 >/dev/null || skip "qemu-system-x86_64 is not installed"
[ -e "$library" ] || {
  echo "$library is missing: cargo build --release -p nptl-preload" >&2
  exit 1
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.05
  done
}

# says FILE TEXT: whether the file contains the text.
says() {
  grep -qF -- "$2" "$1" 2>/dev/null
}

# number FILE OFFSET: the four bytes there, as a number.
number() {
  od -A n -t u4 -j "$2" -N 4 "$1" | tr -d ' '
}

# The arguments of every QEMU: no device but those that a script asks for, and SeaBIOS's log.
bare=(-m 64 -nodefaults -no-user-config -display none)
bios_log() {
  echo -debugcon "file:$1" -global isa-debugcon.iobase=0x402
}

kvm=(-accel kvm -cpu qemu64,-pni)
accelerator=(-accel tcg)

# choose_accelerator: KVM, where there is one that QEMU can make a machine with.
choose_accelerator() {
  case ${NPTL_QEMU_ACCEL:-} in
    tcg) return ;;
    kvm) ;;
    *) [ -r /dev/kvm ] && [ -w /dev/kvm ] || return 0 ;;
  esac
  accelerator=("${kvm[@]}")
}

# choose_accelerator_that_boots: KVM without hardware below it can be too slow for a BIOS, or fail at it.
choose_accelerator_that_boots() {
  choose_accelerator
  [ "${accelerator[1]}" = kvm ] && [ -z "${NPTL_QEMU_ACCEL:-}" ] || return 0
  # shellcheck disable=SC2046 # words
  qemu-system-x86_64 "${kvm[@]}" "${bare[@]}" $(bios_log "$work/kvm") </dev/null >/dev/null 2>&1 &
  machines+=($!)
  if ! wait_for 10 says "$work/kvm" "No bootable device"; then
    accelerator=(-accel tcg)
    echo "KVM boots no machine within 10 s here; TCG emulates them"
  fi
  forget_machines 2>/dev/null
}

# Where QEMU is started: the first words of its command line.
enter=()

# qemu ARGUMENTS...: becomes an unmodified QEMU, with the library preloaded. Its report is on stderr.
qemu() {
  exec "${enter[@]}" env NPTL_MODE="$mode" NPTL_REPORT=stderr NPTL_STATS="$work/stats" LD_PRELOAD="$library" \
    qemu-system-x86_64 "${accelerator[@]}" "${bare[@]}" "$@"
}

# start NAME ARGUMENTS...: one in the background. Its pid is in $started and in running[NAME], its stderr in NAME.err.
declare -A running
start() {
  local name=$1
  shift
  (qemu "$@") </dev/null >"$work/$name.out" 2>"$work/$name.err" &
  started=$!
  running[$name]=$started
  machines+=("$started")
}

# make_pids_cgroup LIMIT: an empty cgroup of that many tasks, in $cgroup.
make_pids_cgroup() {
  local mount path parent
  read -r path mount < <(awk '{ for (i = 7; $i != "-"; i++); }
    $(i + 1) == "cgroup" && $(i + 3) ~ /(^|,)pids(,|$)/ { print $4, $5; exit }' /proc/self/mountinfo) || true
  if [ -n "${mount:-}" ]; then
    parent=$(awk -F: '$2 ~ /(^|,)pids(,|$)/ { print $3 }' /proc/self/cgroup)
    parent=$mount${parent#"${path%/}"}
  else
    read -r path mount < <(awk '{ for (i = 7; $i != "-"; i++); } $(i + 1) == "cgroup2" { print $4, $5; exit }' \
      /proc/self/mountinfo) || return
    parent=$(sed -n 's/^0:://p' /proc/self/cgroup)
    parent=$mount${parent#"${path%/}"}
    # Handing pids on to children is for whoever owns the cgroup.
    while ! grep -qw pids "$parent/cgroup.subtree_control" 2>/dev/null; do
      [ "${#parent}" -gt "${#mount}" ] || return
      parent=$(dirname "$parent")
    done
  fi
  mkdir "$parent/${work##*/}" 2>/dev/null || return
  cgroup=$parent/${work##*/}
  echo "$1" >"$cgroup/pids.max"
}

# make_pid_space NUMBERS: a pid namespace with that many free numbers, whose first process is $holder; the words
# in $space start a command there. Only from 6.14 on is kernel.pid_max that of the namespace; before, writing it would
# change the machine's.
make_pid_space() {
  local release
  release=$(uname -r)
  if ! printf '6.14\n%s\n' "${release%%[!0-9.]*}" | sort -V -C; then
    echo "kernel.pid_max is that of the whole machine before Linux 6.14"
    return 1
  fi >&2
  rm -f "$work/ready"
  # After its first wrap, which 302 numbers bring on, the kernel gives out none below 300.
  unshare --pid --mount --fork --mount-proc --kill-child sh -c '
    number=0
    while [ $number -lt 302 ]; do (:); number=$((number + 1)); done
    echo '$((300 + $1))' >/proc/sys/kernel/pid_max && : >"'"$work"'/ready"
    exec sleep 600' 2>/dev/null &
  wait_for 10 test -e "$work/ready" || {
    machines+=($!)
    return 1
  }
  read -r holder <"/proc/$!/task/$!/children"
  space=(nsenter --target "$holder" --pid --mount --)
}
