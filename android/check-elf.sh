#!/usr/bin/env bash
# What an app's library must be: segments aligned to 16 KB, one name exported, no text relocations.
# android/check-elf.sh FILE
set -euo pipefail
file=${1:?usage: android/check-elf.sh FILE}
readelf=${READELF:-readelf}

fail() {
    echo "$file: $*" >&2
    exit 1
}

alignments=$("$readelf" -lW "$file" | awk '$1 == "LOAD" { print $NF }' | sort -u)
[[ $alignments == 0x4000 ]] || fail "expected segments aligned to 0x4000, found ${alignments:-none}"
exported=$("$readelf" --dyn-syms -W "$file" | awk '$5 == "GLOBAL" && $7 != "UND" { print $8 }')
[[ $exported == JNI_OnLoad ]] || fail "expected JNI_OnLoad alone to be exported, found ${exported:-nothing}"
dynamic=$("$readelf" -dW "$file")
[[ $dynamic != *TEXTREL* ]] || fail "expected code that needs no relocation"
[[ $dynamic == *"soname: [libkinglet_jni.so]"* ]] || fail "expected the name libkinglet_jni.so in it"
