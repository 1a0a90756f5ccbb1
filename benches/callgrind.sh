#!/bin/sh
# User-space instructions of one hot spawn+join, by subject. Instructions do not jitter as time
# does; what the kernel does is not counted. Two runs of different length are subtracted, so that
# start-up and the first, cold spawn fall out. What remains varies by a few dozen with the moment at
# which the child ends and with where the loader places things.
# Usage: benches/callgrind.sh [SUBJECT]...   (default: floor pthread std nptl)
set -eu
cd "$(dirname "$0")/.."
few=200
many=1200

command -v valgrind >/dev/null || {
    echo "valgrind is not installed (Debian: apt-get install valgrind)" >&2
    exit 1
}
cargo build --quiet --release --example instructions
program=${CARGO_TARGET_DIR:-target}/release/examples/instructions

count() {
    log=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$1" "$2" 2>&1) || {
        # Without valgrind's own lines.
        echo "$log" | grep -v '^==' >&2
        return 1
    }
    echo "$log" | sed -n 's/.*Collected *: *//p'
}

printf '%-10s%s\n' subject "instructions per hot spawn+join"
for subject in ${*:-floor pthread std nptl}; do
    first=$(count "$subject" $few)
    second=$(count "$subject" $many)
    printf '%-10s%31d\n' "$subject" $(((second - first) / (many - few)))
done
