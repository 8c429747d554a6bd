#!/usr/bin/env bash
# Builds ios/Kinglet.xcframework, which Package.swift wants: devices, simulators and Macs. On a Mac with Xcode and
# rustup: ios/xcframework.sh [FEATURES]. They are capi,grammar; with capi alone an app is 2 MB smaller, and replies by a
# schema or grammar fail.
set -euo pipefail
features=${1:-capi,grammar}
cd "$(dirname "$0")/.."

# As Package.swift says.
export IPHONEOS_DEPLOYMENT_TARGET=15.0 MACOSX_DEPLOYMENT_TARGET=12.0
targets=(aarch64-apple-ios aarch64-apple-ios-sim x86_64-apple-ios aarch64-apple-darwin x86_64-apple-darwin)
rustup target add "${targets[@]}"
for target in "${targets[@]}"; do
    cargo rustc --profile dist --lib --no-default-features --features "$features" --crate-type staticlib \
        --target "$target"
done

target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
build=$target/xcframework
rm -rf "$build" ios/Kinglet.xcframework
# In a folder of its own: archives of several packages are unpacked into one.
install -d "$build/headers/CKinglet" "$build/simulator" "$build/mac"
cp src/capi/kinglet.h ios/Sources/CKinglet/module.modulemap "$build/headers/CKinglet"
archive() { echo "$target/$1/dist/libkinglet.a"; }
lipo -create "$(archive aarch64-apple-ios-sim)" "$(archive x86_64-apple-ios)" -output "$build/simulator/libkinglet.a"
lipo -create "$(archive aarch64-apple-darwin)" "$(archive x86_64-apple-darwin)" -output "$build/mac/libkinglet.a"
xcodebuild -create-xcframework \
    -library "$(archive aarch64-apple-ios)" -headers "$build/headers" \
    -library "$build/simulator/libkinglet.a" -headers "$build/headers" \
    -library "$build/mac/libkinglet.a" -headers "$build/headers" \
    -output ios/Kinglet.xcframework
