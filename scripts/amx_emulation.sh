#!/usr/bin/env bash
# Runs the tests of matrix products on an emulated CPU that has AMX, for machines whose own has none.
#
#   scripts/amx_emulation.sh [FILTER …]     the kernels crate's tests with such names; without any, products and tiles
#
# Bochs boots a Linux that has nothing but the test program: about two minutes, then a hundred times slower than here.
# The exit code is the tests'. Bochs, the kernel and what starts it come from Debian, by apt, into target/amx; nothing
# is installed on the system. Needs apt, strip, chrt and script. CARGO_TARGET_DIR is honoured.
#
# Not its job: speed, of which an emulator says nothing; CI, where it would take too long.
#
# Invariant: it ends within LIMIT seconds, and a second run needs no network.
#
# Bochs 3.0 has the tiles but not XFD, by which Linux saves them only for those who use them. The kernel is told that
# XFD is there (setcpuid=324), and its registers are ignored, so tiles are not saved when threads are switched. That is
# why the tests run as real-time threads, which are switched only where they wait, and there no tiles are in use.
# And it takes bytes with a sign for bytes without one, in all four products of bytes (tdpbssd of -1 and 1 is 255). What
# multiplies such codes is left out: two tests of tiles, and those of quantised weights, which come to tiles with more
# than one row. Codes of seven bits go through all of it here; that signs count is what tiles in plain Rust show, whose
# tests need no emulation.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT=${LIMIT:-900}
TARGET=$(realpath -m "${CARGO_TARGET_DIR:-target}")
DIR=$TARGET/amx
LIBS=usr/lib/x86_64-linux-gnu
SUITE=trixie
FILTERS=("$@")
[[ ${#FILTERS[@]} -gt 0 ]] || FILTERS=(ops::linear cpu::simd)

# Unpacks Debian packages, with all that they need, into $DIR/root.
unpack() {
    mkdir -p "$DIR"/apt/{lists,cache/archives}/partial
    : >"$DIR/apt/status"
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    printf "deb [signed-by=$key] http://deb.debian.org/debian %s main\n" $SUITE $SUITE-backports >"$DIR/apt/sources"
    local options=(
        -o Dir::Etc::sourcelist="$DIR/apt/sources" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$DIR/apt/lists"
        -o Dir::Cache="$DIR/apt/cache" -o Dir::State::status="$DIR/apt/status" -o APT::Sandbox::User=root
        -o Acquire::Languages=none -o APT::Install-Recommends=false -o Debug::NoLocking=true
    )
    apt-get "${options[@]}" -qq update
    apt-get "${options[@]}" -qq -y --download-only install bochs bochs-term genisoimage isolinux syslinux-common \
        busybox-static
    # From 6.15 on Linux knows setcpuid. The kernel is in a package that the other depends on.
    local image
    image=$(apt-cache "${options[@]}" depends linux-image-cloud-amd64/$SUITE-backports |
        sed -n 's/ *Depends: linux-image-\([0-9].*\)/linux-binary-\1/p')
    (cd "$DIR/apt/cache/archives" && apt-get "${options[@]}" -qq download "$image")
    local package
    for package in "$DIR"/apt/cache/archives/*.deb; do
        dpkg -x "$package" "$DIR/root.part"
    done
    mv "$DIR/root.part" "$DIR/root"
    rm -rf "$DIR/apt"
}

# Runs a program of $DIR/root with its own libraries.
ours() {
    local program=$1
    shift
    "$DIR/root/$LIBS/ld-linux-x86-64.so.2" --library-path "$DIR/root/$LIBS" "$DIR/root/usr/bin/$program" "$@"
}

# The path of the test program, built as `cargo test` does.
tests() {
    cargo test -p kernels --lib --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1
}

# A CD that boots into the tests. $1: the test program
cd_image() {
    local root=$DIR/initrd cd=$DIR/cd
    rm -rf "$root" "$cd"
    mkdir -p "$root"/{bin,dev,proc,sys,tmp} "$cd"
    cp "$DIR/root/usr/bin/busybox" "$root/bin/"
    cp "$1" "$root/tests"
    # The symbols would take the emulated drive longer to read than the tests take to run.
    strip "$root/tests"
    cp "$(command -v chrt)" "$root/bin/"
    local file
    for file in $(ldd "$1" "$root/bin/chrt" | grep -o '/lib[^ ]*' | sort -u); do
        mkdir -p "$root$(dirname "$file")"
        cp -L "$file" "$root$file"
    done
    cat >"$root/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox grep -m1 'model name' /proc/cpuinfo
/bin/busybox grep -o 'amx_[a-z0-9]*' /proc/cpuinfo
RUST_BACKTRACE=0 /bin/chrt -f 1 /tests --test-threads=1 --nocapture --skip codes_with_a_sign --skip quantized_tests --skip tiles_in_plain_rust ${FILTERS[*]}
echo "exit code: \$?"
/bin/busybox sleep 1000
INIT
    chmod +x "$root/init"
    (cd "$root" && find . | ./bin/busybox cpio -o -H newc 2>/dev/null | gzip -1 >"$cd/initrd")
    cp "$DIR"/root/usr/lib/modules/*/vmlinuz "$DIR/root/usr/lib/ISOLINUX/isolinux.bin" \
        "$DIR/root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$cd/"
    # Without ACPI: turning it on makes Bochs leave its system management mode in a state that it refuses.
    cat >"$cd/isolinux.cfg" <<CFG
DEFAULT tests
LABEL tests
 KERNEL /vmlinuz
 INITRD /initrd
 APPEND console=ttyS0 quiet acpi=off mitigations=off tsc=reliable lpj=1000000 panic=-1 setcpuid=324
CFG
    ours genisoimage -quiet -o "$DIR/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
        -boot-info-table -R "$cd"
}

# Boots it. What the tests print comes to standard output as they print it.
boot() {
    cat >"$DIR/bochsrc" <<RC
cpu: model=sapphire_rapids, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=$DIR/root/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$DIR/root/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$DIR/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$DIR/serial.log
log: $DIR/bochs.log
panic: action=fatal
error: action=ignore
display_library: term
clock: sync=none, time0=utc
RC
    export LTDL_LIBRARY_PATH=$DIR/root/$LIBS/bochs/plugins BXSHARE=$DIR/root/usr/share/bochs TERM=xterm
    export -f ours
    export DIR LIBS
    : >"$DIR/serial.log"
    tail -f "$DIR/serial.log" &
    local tail=$!
    # It draws a screen, for which it wants a terminal.
    timeout "$LIMIT" script -qfc "bash -c 'ours bochs-bin -q -f $DIR/bochsrc'" /dev/null \
        </dev/null >"$DIR/screen.log" 2>&1 &
    local bochs=$!
    # The machine cannot turn itself off.
    while kill -0 "$bochs" 2>/dev/null && ! grep -q '^exit code: ' "$DIR/serial.log"; do
        sleep 1
    done
    sleep 1
    kill "$bochs" "$tail" 2>/dev/null || true
    wait
}

[[ -d $DIR/root ]] || unpack
cd_image "$(tests)"
boot
code=$(tr -d '\r' <"$DIR/serial.log" | sed -n 's/^exit code: //p')
if [[ -z $code ]]; then
    echo "the tests did not end within ${LIMIT}s; $DIR/serial.log and bochs.log say how far they came" >&2
    exit 1
fi
exit "$code"
