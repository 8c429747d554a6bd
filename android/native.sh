#!/usr/bin/env bash
# Builds kinglet/src/main/jniLibs/<abi>/libkinglet_jni.so for Gradle, with a real NDK: android/native.sh [FEATURES]
# FEATURES are capi,grammar; capi alone is 2 MB smaller, and replies by a schema or grammar fail then.
# Wants ANDROID_NDK_HOME (r27 or later), cargo-ndk (cargo install cargo-ndk) and, once,
# rustup target add aarch64-linux-android x86_64-linux-android.
set -euo pipefail
ndk=${ANDROID_NDK_HOME:?the folder of the NDK}
features=${1:-capi,grammar}
cd "$(dirname "$0")/.."

platform=23 # minSdk of kinglet/build.gradle.kts
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
tools=$(echo "$ndk"/toolchains/llvm/prebuilt/*/bin)
for pair in arm64-v8a:aarch64-linux-android x86_64:x86_64-linux-android; do
    abi=${pair%%:*} triple=${pair#*:}
    cargo ndk --target "$abi" --platform "$platform" rustc --profile dist --lib --no-default-features --features "$features" \
        --crate-type staticlib
    out=android/kinglet/src/main/jniLibs/$abi
    mkdir -p "$out"
    CC=$tools/$triple$platform-clang android/link.sh "$target/$triple/dist/libkinglet.a" "$out/libkinglet_jni.so"
    "$tools/llvm-strip" "$out/libkinglet_jni.so"
    READELF=$tools/llvm-readelf android/check-elf.sh "$out/libkinglet_jni.so"
done
