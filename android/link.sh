#!/usr/bin/env bash
# Links the JNI layer and the static library into the one shared library of an app: android/link.sh ARCHIVE OUT
# CC is the compiler, of the NDK or of the desktop, where JNI_INCLUDE has the folders of jni.h as flags. Segments are
# aligned to 16 KB, the pages of newer devices, and nothing but what the JVM looks for is exported.
set -euo pipefail
archive=${1:?usage: android/link.sh ARCHIVE OUT}
out=${2:?usage: android/link.sh ARCHIVE OUT}
here=$(dirname "$0")

read -ra flags <<<"${JNI_INCLUDE:-}"
"${CC:-cc}" -std=c99 -O2 -g -Wall -Wextra -Werror -fPIC -shared -I "$here/../src/capi" "${flags[@]}" \
    "$here/kinglet/src/main/c/kinglet_jni.c" "$archive" -o "$out" \
    -Wl,--version-script="$here/kinglet/src/main/c/exports.map" -Wl,--gc-sections \
    -Wl,-z,max-page-size=16384 -Wl,--no-undefined -Wl,-soname,libkinglet_jni.so -lm -ldl
