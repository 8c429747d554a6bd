#!/usr/bin/env bash
# Installs the C library below a prefix: src/capi/install.sh PREFIX [FEATURES]. Header, shared and static library, pkg-config
# file. FEATURES are `capi`, or `capi,grammar` for replies by a schema, which is half as large again;
# `cargo cinstall` of cargo-c does the same and more, where it is at hand.
set -euo pipefail
prefix=$(realpath -m "${1:?usage: src/capi/install.sh PREFIX [FEATURES]}")
features=${2:-capi}
cd "$(dirname "$0")/../.."

target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
# Optimized as a whole, the C interface of a dependency could not be told from ours, and would be exported with it.
whole=(); [[ $features != *grammar* ]] || whole=(--config 'profile.dist.lto="off"')
cargo "${whole[@]}" rustc --profile dist --lib --no-default-features --features "$features" --crate-type cdylib,staticlib -- \
    -C link-arg=-Wl,-soname,libkinglet.so.0

install -d "$prefix/include" "$prefix/lib/pkgconfig"
install -m 644 src/capi/kinglet.h "$prefix/include"
install -m 755 "$target/dist/libkinglet.so" "$prefix/lib/libkinglet.so.$version"
install -m 644 "$target/dist/libkinglet.a" "$prefix/lib"
ln -sf "libkinglet.so.$version" "$prefix/lib/libkinglet.so.0"
ln -sf libkinglet.so.0 "$prefix/lib/libkinglet.so"
cat > "$prefix/lib/pkgconfig/kinglet.pc" <<PC
prefix=$prefix
includedir=\${prefix}/include
libdir=\${prefix}/lib

Name: kinglet
Description: Language models on the device
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -lkinglet
Libs.private: -lpthread -ldl -lm -lgcc_s
PC
