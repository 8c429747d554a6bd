#!/usr/bin/env bash
# Puts an AAR together as Gradle's plugin would: android/aar.sh CLASSES JNI OUT. CLASSES is where kotlinc has put
# those of kinglet/src/main/kotlin; JNI has <abi>/libkinglet_jni.so, as kinglet/src/main/jniLibs after native.sh.
set -euo pipefail
usage='usage: android/aar.sh CLASSES JNI OUT'
classes=${1:?$usage}
jni=${2:?$usage}
out=$(realpath -m "${3:?$usage}")
here=$(dirname "$0")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
jar --create --no-manifest --file "$folder/classes.jar" -C "$classes" .
cp "$here/kinglet/src/main/AndroidManifest.xml" "$folder"
# The plugin takes the package from its build file; who has only the archive finds it here.
sed -i 's/<manifest /&package="dev.kinglet" /' "$folder/AndroidManifest.xml"
cp "$here/kinglet/consumer-rules.pro" "$folder/proguard.txt"
: >"$folder/R.txt" # it has no resources, and says so
for library in "$jni"/*/libkinglet_jni.so; do
    "$here/check-elf.sh" "$library"
    install -D -m 644 "$library" "$folder/jni/$(basename "$(dirname "$library")")/libkinglet_jni.so"
done
rm -f "$out"
jar --create --no-manifest --file "$out" -C "$folder" .
