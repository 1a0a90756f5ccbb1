"""gdb commands for processes and core files with threads of the crate nptl.

nptl-failures   the last refused spawns, newest first, with their reports
nptl-stacks     every stack: address, size, cache, state, tid, name of its thread

Embedded in the binary (.debug_gdb_scripts); gdb loads it where `auto-load safe-path` allows, or with
`source gdb/nptl.py`. Needs neither debug information nor symbols: a section of its own holds the static
that has the addresses of the rest.
"""

import re
import struct
import time

import gdb

STATES = ["gone", "live", "ending", "cached", "doomed", "unmapping"]


def read(address, size):
    return bytes(gdb.selected_inferior().read_memory(address, size))


def words(address, count):
    return struct.unpack("%dQ" % count, read(address, 8 * count))


def directory():
    sections = gdb.execute("info files", to_string=True)
    places = re.findall(r"(0x[0-9a-f]+) - 0x[0-9a-f]+ \S+ \.nptl\.directory", sections)
    if not places:
        raise gdb.GdbError("no program with the crate nptl here: it has no section .nptl.directory")
    for place in places:
        found = words(int(place, 16), 16)
        if found[0] == 3:
            return found
    raise gdb.GdbError(".nptl.directory has version %d, this script knows 3" % found[0])


class Failures(gdb.Command):
    """The last refused spawns of the crate nptl, newest first."""

    def __init__(self):
        super().__init__("nptl-failures", gdb.COMMAND_STATUS)

    def invoke(self, argument, from_tty):
        _, ring, first, count, size = directory()[:5]
        failures = []
        for index in range(count):
            at = ring + first + index * size
            number, seconds, nanoseconds, tid, length = struct.unpack("QqqiI", read(at, 32))
            if number:
                text = read(at + 32, length).decode("utf-8", "replace")
                failures.append((number, seconds, nanoseconds, tid, text))
        if not failures:
            print("no spawn was refused")
        for number, seconds, nanoseconds, tid, text in sorted(failures, reverse=True):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
            print("#%d %s.%03d UTC, refused to tid %d" % (number, when, nanoseconds // 1000000, tid))
            print("  " + text.replace("\n", "\n  "))


class Stacks(gdb.Command):
    """Every stack of the crate nptl: address, size, cache, state, tid, name of its thread."""

    def __init__(self):
        super().__init__("nptl-stacks", gdb.COMMAND_STATUS)

    def invoke(self, argument, from_tty):
        found = directory()
        records, global_cache = found[5:7]
        after, base, guard, size, tid, name, length, state, owner = found[7:16]
        at = words(records, 1)[0]
        caches = {global_cache: "global cache"}
        counts = {}
        while at:
            word = lambda offset: words(at + offset, 1)[0]
            what = STATES[read(at + state, 1)[0]]
            counts[what] = counts.get(what, 0) + 1
            if what != "gone":
                start = word(base) + word(guard)
                cache = caches.setdefault(word(owner), "private cache %d" % len(caches))
                line = "0x%x..0x%x %8d KiB %-15s %-9s" % (
                    start, start + word(size), word(size) // 1024, cache, what)
                if what in ("live", "ending"):
                    line += " tid %d" % struct.unpack("i", read(word(tid), 4))
                    if word(name):
                        line += " \"%s\"" % read(word(name), word(length)).decode("utf-8", "replace")
                print(line)
            at = word(after)
        print(", ".join("%d %s" % (count, what) for what, count in sorted(counts.items())) or "no stacks")


Failures()
Stacks()
