#!/usr/bin/env python3
"""Makes a copy of libnccl.so.2 that carries device code for one GPU architecture only.

    scripts/prune_nccl.py libnccl.so.2 pruned/libnccl.so.2 --arch 90

For carrying NCCL to a test machine: `gpu_bundle.sh` uses it. The library embeds its kernels once per
architecture, 252 MB in all for 2.30.7. This fills the images of every other architecture with zeros in
place, so that offsets stay valid and the file compresses well: sm_90 alone gives about 39 MB with xz.

Invariant: the pruned library works on that architecture and on no other; nothing but images is changed.
"""
import argparse
import pathlib
import struct
import sys

FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
ENTRY_IS_ELF = 2  # 1 is PTX


def images(blob):
    """Yield (kind, arch, payload offset, payload size) of every embedded image."""
    at = blob.find(FATBIN_MAGIC)
    while at >= 0:
        version, header = struct.unpack_from("<HH", blob, at + 4)
        (body,) = struct.unpack_from("<Q", blob, at + 8)
        if version != 1 or header != 16:
            at = blob.find(FATBIN_MAGIC, at + 4)
            continue
        entry, end = at + header, at + header + body
        while entry < end:
            kind, _, entry_header = struct.unpack_from("<HHI", blob, entry)
            (size,) = struct.unpack_from("<Q", blob, entry + 8)
            (arch,) = struct.unpack_from("<I", blob, entry + 28)
            yield kind, arch, entry + entry_header, size
            entry += entry_header + size
        at = blob.find(FATBIN_MAGIC, end)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability to keep, e.g. 90 (default)")
    args = parser.parse_args()

    blob = bytearray(args.source.read_bytes())
    kept = blanked = 0
    for kind, arch, start, size in images(bytes(blob)):
        if kind == ENTRY_IS_ELF and arch == args.arch:
            kept += size
        else:
            blob[start : start + size] = bytes(size)
            blanked += size
    if kept == 0:
        sys.exit(f"{args.source}: no machine code for sm_{args.arch}; nothing written")
    args.target.parent.mkdir(parents=True, exist_ok=True)
    args.target.write_bytes(blob)
    print(f"sm_{args.arch}: kept {kept >> 20} MiB of device code, blanked {blanked >> 20} MiB")


if __name__ == "__main__":
    main()
