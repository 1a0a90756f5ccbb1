#!/usr/bin/env bash
# QEMU is refused a vCPU's thread and aborts: by a pids cgroup that is full, and in a pid namespace that has no number
# left. Shows what QEMU says, what the library says before it, and what gdb finds in the core file.
#
#   examples/qemu/crash.sh [explain|threads]...
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/harness.sh"

vcpus=4
# The shell, QEMU's main thread, RCU's, and two vCPUs.
room=5

# What each mode may say of the cause. The refused call of mode threads can be repeated, so its cause is proven.
declare -A certainty=([explain]=inferred [threads]=proven)

# crashes WHERE CAUSE COMMAND...: QEMU, where there is no room. The command puts a shell there, which lives on to tell how
# QEMU has ended.
crashes() {
  local where=$1 cause=$2 status=0 core found
  shift 2
  rm -rf "$work/cwd"
  mkdir "$work/cwd"
  enter=("$@" bash -c 'cd "$0"; ulimit -S -c unlimited; "$@"; exit $?' "$work/cwd")
  (qemu -smp $vcpus) </dev/null >"$work/qemu.out" 2>"$work/qemu.err" || status=$?
  printf '\n---- QEMU in %s, mode %s, says:\n' "$where" "$mode"
  cat "$work/qemu.err"
  [ $status -eq 134 ] || fail "$where: QEMU ended with $status and did not abort"
  says "$work/qemu.err" "qemu_thread_create: Resource temporarily unavailable" || fail "$where: QEMU's message is missing"
  grep -q "^nptl: pthread_create refused: .*errno=EAGAIN cause=$cause certainty=${certainty[$mode]}: " "$work/qemu.err" ||
    fail "$where: the library does not name $cause, ${certainty[$mode]}"
  # Whoever reads on from QEMU's message upwards finds the reason there.
  awk '/^nptl: / { reason = NR } /qemu_thread_create/ { exit !(reason && reason < NR) }' "$work/qemu.err" ||
    fail "$where: the report comes after QEMU's message"

  core=$(find "$work/cwd" -type f | sed -n 1p)
  if [ -z "$core" ]; then
    echo "skipped: qemu/crash: the core: kernel.core_pattern takes it elsewhere: $(cat /proc/sys/kernel/core_pattern)"
  elif ! command -v gdb >/dev/null; then
    echo "skipped: qemu/crash: the core: gdb is not installed"
  else
    found=$(gdb -nx -batch -ex "source $top/gdb/nptl.py" -ex nptl-failures -ex nptl-stacks \
      "$(command -v qemu-system-x86_64)" "$core" 2>"$work/gdb.err") || fail "$where: gdb"
    printf -- '---- gdb, of the core file:\n'
    sed -n '/^Core was generated/p; /^#[0-9]* 20/,$p' <<<"$found"
    grep -q "cause=$cause" <<<"$found" || {
      cat "$work/gdb.err"
      fail "$where: nptl-failures does not tell of $cause"
    }
    # A mode of glibc's threads has no stacks to show.
    [ "$mode" = explain ] || grep -qE ' live( |$)' <<<"$found" || fail "$where: nptl-stacks shows no live stack"
  fi
  passed "$where: $cause is told, then QEMU aborts"
}

choose_accelerator
have_cgroup=yes have_numbers=yes
make_pids_cgroup $room || {
  have_cgroup=
  echo "skipped: qemu/crash: no pids cgroup can be made here"
}
make_pid_space $room || {
  have_numbers=
  echo "skipped: qemu/crash: no small pid namespace can be made here"
}
for mode in "${modes[@]}"; do
  [ -z "$have_cgroup" ] || crashes "a pids cgroup" PidsCgroup \
    bash -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$cgroup"
  [ -z "$have_numbers" ] || crashes "a pid namespace" PidNumbers "${space[@]}"
done
