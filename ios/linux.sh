#!/usr/bin/env bash
# Builds the Swift package on Linux and checks it against the real library and the small model:
# ios/linux.sh TREE [SESSIONS]
# TREE is a folder of 2.5 GB where Debian's Swift is put, once, by debootstrap, which takes 5 to 12 minutes. As root.
set -euo pipefail
tree=$(realpath -m "${1:?usage: ios/linux.sh TREE [SESSIONS]}")
sessions=${2:-100}
cd "$(dirname "$0")/.."

if ! chroot "$tree" test -x /usr/bin/swift 2>/dev/null; then
    mirror=$(sed -n 's/^URIs: //p' /etc/apt/sources.list.d/debian.sources | head -1)
    debootstrap --variant=minbase trixie "$tree" "$mirror"
    chroot "$tree" apt-get install -y --no-install-recommends swiftlang libc6-dev g++ binutils
fi

cargo build --release --lib --test layers # with a test: as `cargo test` has made it
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
install -d "$tree/kinglet" "$tree/out"
cp "$target/release/libkinglet.so" "$tree/out"
mount --bind -o ro . "$tree/kinglet"
mountpoint -q "$tree/proc" || mount -t proc proc "$tree/proc" # swiftc finds its own libraries by it
trap 'umount "$tree/kinglet" "$tree/proc"' EXIT
chroot "$tree" swift build -c release --package-path /kinglet/ios --scratch-path /out/build -Xlinker -L/out
# The files that need UIKit too, against a stand-in for what they use of it.
chroot "$tree" swiftc -emit-module -module-name UIKit -o /out/UIKit.swiftmodule /kinglet/ios/StandIn/UIKit.swift
chroot "$tree" sh -c 'swiftc -swift-version 6 -typecheck -warnings-as-errors -module-name Kinglet \
    -I /out -I /kinglet/ios/Sources /kinglet/ios/Sources/Kinglet/*.swift'
chroot "$tree" env LD_LIBRARY_PATH=/out /out/build/release/check \
    /kinglet/models/lfm2-smol-Q4_0.gguf /tmp/kinglet "$sessions"
