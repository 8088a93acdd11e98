#!/usr/bin/env bash
# Prints what each CUDA kernel of the last build takes (registers, shared memory, stack, spills), and fails where
# registers went to memory.
#
#   scripts/cuda_resources.sh [DIR]     DIR: an OUT_DIR of the kernels crate; the newest build with `cuda` by default
#
# Read from what the assembler said when the objects were built (build.rs keeps it beside each object), so nothing
# is compiled here. A spill or a stack frame costs a trip to memory in the innermost loop; what cannot
# avoid one is named in EXCEPTIONS with the reason.
#
# Invariant: a kernel is never passed over: an object without its report is a failure, and so is an empty list.
set -euo pipefail
cd "$(dirname "$0")/.."

# Extended regular expressions over "ARCHITECTURE KERNEL", each with its reason.
EXCEPTIONS=()

TARGET=${CARGO_TARGET_DIR:-target}
dir=${1:-}
if [[ -z $dir ]]; then
    newest=$(find "$TARGET" -path '*/build/kernels-*/out/*.resources' -printf '%T@ %h\n' 2>/dev/null | sort -rn | head -1)
    dir=${newest#* }
fi
[[ -n $dir && -d $dir ]] || {
    echo "cuda_resources.sh: no kernels were built; run: cargo build -p kernels --features cuda" >&2
    exit 1
}

status=0
for object in "$dir"/*.o; do
    if [[ ! -s ${object%.o}.resources ]]; then
        echo "cuda_resources.sh: $object has no report of its kernels; build it again" >&2
        status=1
    fi
done

# One line for each kernel and architecture: file, architecture, registers, shared, stack, stores, loads, name.
lines() {
    local report
    for report in "$dir"/*.resources; do
        awk -v file="$(basename "$report" .resources)" '
            /Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
            /Function properties for/ { owner = $NF }
            /bytes stack frame/ {
                # Functions that were not inlined have their own frames, on the account of the kernel before them.
                if (owner == name || owner == "") { stack = $1; stores = $5; loads = $9 }
                else { stack += $1; stores += $5; loads += $9 }
            }
            /Used [0-9]+ registers/ {
                match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5)
                shared = 0
                if (match($0, /[0-9]+ bytes smem/)) { shared = substr($0, RSTART, RLENGTH); sub(/ .*/, "", shared) }
                print file, arch, registers, shared, stack, stores, loads, name
                stack = stores = loads = 0; owner = ""
            }' "$report"
    done | c++filt | sed -E 's/\(anonymous namespace\):://g; s/(cluster|flashinfer):://g'
}

table=$(lines | sort)
count=$(grep -c . <<<"$table" || true)
if ((count == 0)); then
    echo "cuda_resources.sh: $dir has no reports of kernels" >&2
    exit 1
fi

printf '%9s %7s %6s %7s  %-8s %s\n' registers shared stack spilled arch kernel
while read -r file arch registers shared stack stores loads name; do
    # The arguments say nothing that the template parameters do not.
    short=$(sed -E 's/^void //; s/\([^()]*\)$//' <<<"$name")
    note=
    if ((stack + stores + loads > 0)); then
        note="  <- spills"
        for exception in "${EXCEPTIONS[@]}"; do
            [[ "$arch $short" =~ ${exception%% = *} ]] && note="  (${exception#* = })"
        done
        [[ $note == *"<- spills" ]] && status=1
    fi
    printf '%9s %7s %6s %7s  %-8s %s: %s%s\n' "$registers" "$shared" "$stack" $((stores + loads)) "$arch" "$file" "${short:0:120}" "$note"
done <<<"$table"

echo "$count kernels in $dir"
if ((status != 0)); then
    echo "cuda_resources.sh: kernels with a stack frame or spills; give them fewer registers to hold, or an exception with its reason" >&2
fi
exit $status
