#!/usr/bin/env bash
# QEMU with enough room: nothing may differ from QEMU without the library, but for who makes its threads. It boots, its
# guest reads and writes a disk that an iothread serves, it migrates to a second QEMU by several channels, and both quit. All
# of it behind QEMU's own system-call filters.
#
#   examples/qemu/room.sh [--times N] [explain|threads]...
# shellcheck source-path=SCRIPTDIR
times=1
if [ "${1:-}" = --times ]; then
  times=$2
  shift 2
fi
source "$(dirname "$0")/harness.sh"

for tool in as ld; do
  command -v $tool >/dev/null || skip "$tool is not installed (binutils)"
done
as --32 -o "$work/guest.o" "$(dirname "$0")/guest.s"
ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o "$work/guest" "$work/guest.o"

declare -A monitor

# machine NAME ARGUMENTS...: one that has the disk, and a monitor.
machine() {
  local name=$1
  shift
  mkfifo "$work/$name.in" "$work/$name.out"
  start "$name" -smp 2 -serial "file:$work/$name.serial" -qmp "pipe:$work/$name" \
    -object iothread,id=io -drive "if=none,id=disk,format=raw,file=$work/disk" \
    -device virtio-blk-pci,drive=disk,iothread=io,bootindex=0 \
    -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny "$@"
  exec {monitor[$name]}<>"$work/$name.out"
  ask "$name" qmp_capabilities
}

# ask NAME COMMAND [ARGUMENTS]: by QEMU's monitor; the answer is in $answer.
ask() {
  local arguments=${3:-}
  printf '{"execute": "%s"%s}\n' "$2" "${arguments:+, \"arguments\": $arguments}" >"$work/$1.in"
  while read -r -t 60 -u "${monitor[$1]}" answer; do
    case $answer in
      *'"return"'*) return ;;
      *'"error"'*) break ;;
    esac
  done
  fail "$1: $2: ${answer:-no answer}"
}

state_is() {
  ask "$1" "$2"
  [[ $answer == *"\"status\": \"$3\""* ]]
}

# wrote COUNT: whether the guest has done so many rounds of its disk.
wrote() {
  [ "$(number "$work/disk" 512)" -ge "$1" ]
}

# quits NAME: in order, and with nothing of the library's on stderr.
quits() {
  local status=0
  ask "$1" quit
  exec {monitor[$1]}>&-
  wait "${running[$1]}" || status=$?
  [ $status -eq 0 ] || fail "$1: QEMU ended with $status"
  ! says "$work/$1.err" nptl || fail "$1: the library reports, though nothing was refused"
  rm "$work/$1."{in,out}
}

once() {
  local count name multifd='{"capabilities": [{"capability": "multifd", "state": true}]}'
  rm -f "$work"/{stats,*.serial,migrate}
  cp "$work/guest" "$work/disk"
  truncate -s 1M "$work/disk"

  machine source
  wait_for 60 wrote 20 || fail "the guest does not write its disk"
  machine target -incoming defer
  for name in source target; do
    ask $name migrate-set-capabilities "$multifd"
  done
  ask target migrate-incoming "{\"uri\": \"unix:$work/migrate\"}"
  ask source migrate "{\"uri\": \"unix:$work/migrate\"}"
  wait_for 60 state_is source query-migrate completed || fail "the migration does not complete: $answer"
  wait_for 60 state_is target query-status running || fail "the target does not run: $answer"
  count=$(number "$work/disk" 512)
  wait_for 60 wrote $((count + 20)) || fail "the guest does not go on after the migration"
  [ "$(cat "$work/source.serial" "$work/target.serial")" = B ] || fail "the guest has started again, or met an error"
  quits source
  quits target

  # What QEMU cannot tell: that the library was there, and who has made the threads.
  [ "$(grep -c "mode=$mode refusals=0 " "$work/stats")" = 2 ] || fail "statistics: $(cat "$work/stats")"
  if [ "$mode" = threads ]; then
    ! grep -q ' cache_misses=[0-3] ' "$work/stats" || fail "QEMU has made fewer threads by this crate than it has: $(cat "$work/stats")"
  fi
}

choose_accelerator_that_boots
for mode in "${modes[@]}"; do
  for ((turn = 1; turn <= times; turn++)); do
    once
  done
  passed "boots, writes its disk, migrates and quits, $times time(s)"
done
