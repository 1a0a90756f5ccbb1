#!/bin/sh
# User-space instructions of one hot spawn+join, by subject. Instructions do not jitter as time
# does; what the kernel does is not counted. Two runs of different length are subtracted, so that
# start-up and the first, cold spawn fall out.
# Usage: benches/callgrind.sh [SUBJECT]...   (default: floor pthread std nptl)
set -eu
cd "$(dirname "$0")/.."
few=200
many=1200

cargo build --quiet --release --example instructions
program=${CARGO_TARGET_DIR:-target}/release/examples/instructions

count() {
    log=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$1" "$2" 2>&1) || {
        echo "$log" >&2
        return 1
    }
    echo "$log" | sed -n 's/.*Collected *: *//p'
}

for subject in ${*:-floor pthread std nptl}; do
    first=$(count "$subject" $few)
    second=$(count "$subject" $many)
    echo "$subject: $(((second - first) / (many - few))) instructions per hot spawn+join"
done
