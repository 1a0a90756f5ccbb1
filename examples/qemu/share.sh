#!/usr/bin/env bash
# Seven QEMUs share a pid namespace that has numbers for six. The seventh is told so and aborts; kernel.pid_max of that
# namespace is raised, and all seven run.
#
#   examples/qemu/share.sh [explain|threads]...
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/harness.sh"

vcpus=8
# Each has the main thread, RCU's, eight vCPUs, and under KVM perhaps a worker of the kernel's: 10 or 11 numbers. Six of
# the larger kind fit, seven of the smaller do not.
numbers=68

machine() {
  # shellcheck disable=SC2046 # words
  start "$1" -smp $vcpus $(bios_log "$work/$1.bios")
}

# runs NAME: its BIOS has seen every vCPU at work, and has got to where it looks for a disk.
runs() {
  says "$work/$1.bios" "Found $vcpus cpu(s)" && says "$work/$1.bios" "No bootable device"
}

share() {
  local number status=0 raised
  make_pid_space $numbers || return 1
  enter=("${space[@]}")
  for number in {1..6}; do
    machine "$number"
    wait_for 60 runs "$number" || fail "QEMU $number of 7 does not run"
  done
  machine 7
  wait "$started" 2>/dev/null || status=$?
  cat "$work/7.err"
  [ $status -eq 134 ] || fail "the seventh QEMU ended with $status and did not abort"
  says "$work/7.err" "qemu_thread_create: Resource temporarily unavailable" || fail "QEMU's message is missing"
  grep -q "^nptl: pthread_create refused: .*errno=EAGAIN cause=PidNumbers " "$work/7.err" ||
    fail "the library does not tell that the numbers are used up"
  says "$work/7.err" "sysctl kernel.pid_max=N inside this pid namespace" || fail "the library does not say what to change"

  raised=$("${space[@]}" sh -c 'echo 4096 >/proc/sys/kernel/pid_max && cat /proc/sys/kernel/pid_max') ||
    fail "kernel.pid_max of the namespace cannot be raised"
  [ "$raised" = 4096 ] || fail "kernel.pid_max of the namespace reads $raised"
  rm "$work/7.bios"
  machine 7
  wait_for 60 runs 7 || fail "the seventh QEMU does not run with more numbers either"
  for number in {1..7}; do
    kill -0 "${running[$number]}" || fail "QEMU $number has ended"
    ! says "$work/$number.err" nptl || fail "the library reports, though QEMU $number lacks nothing"
  done
  passed "the seventh QEMU is told of kernel.pid_max; raised, all seven run"
}

before=$(cat /proc/sys/kernel/pid_max)
choose_accelerator_that_boots
for mode in "${modes[@]}"; do
  rm -f "$work"/*.{bios,err}
  share || skip "no small pid namespace can be made here"
  forget_machines 2>/dev/null
done
[ "$(cat /proc/sys/kernel/pid_max)" = "$before" ] || fail "kernel.pid_max of the machine has changed"
