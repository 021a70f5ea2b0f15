#!/usr/bin/env bash
# Run the tests of what depends on Python 3.14 (annotations that are evaluated late) where it is not
# installed. Debian's packages of it are unpacked below .tox, with the C library that they need, and
# run by the loader of that library, so that nothing is installed. Where this cannot be done, one
# line says why, and that is no failure.
set -euo pipefail
cd "$(dirname "$0")/.."

mirror=https://deb.debian.org/debian
tests="signatures handlers types property_payloads envelope codec session"
root="$PWD/.tox/python3.14"

skip() {
    echo "Python 3.14: skipped, $1"
    exit 0
}

python3.14 -c "" 2>/dev/null && skip "tox runs all tests on the one that is installed"
for command in curl dpkg dpkg-deb python3 sha256sum timeout; do
    command -v "$command" >/dev/null || skip "there is no $command to unpack Debian's packages"
done
python3 -c "import lzma, pip" 2>/dev/null || skip "python3 has no lzma or no pip"

mkdir -p "$root"
arch=$(dpkg --print-architecture)
curl -fsS --max-time 40 -o "$root/Packages.xz" "$mirror/dists/sid/main/binary-$arch/Packages.xz" ||
    skip "$mirror cannot be reached"

# What python3.14 depends on: the path and the checksum of each package.
python3 - "$root/Packages.xz" >"$root/list" <<'END' || skip "Debian's package has other dependencies"
import lzma, re, sys

known = {}
for paragraph in lzma.open(sys.argv[1], "rt", encoding="utf-8").read().split("\n\n"):
    fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
    known[fields.get("Package")] = fields
wanted, found = ["python3.14"], {"tzdata", "media-types", "netbase", "readline-common"}
while wanted:
    if (name := wanted.pop()) in known and name not in found:
        found.add(name)
        depends = known[name].get("Depends", "") + "," + known[name].get("Pre-Depends", "")
        wanted += re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9.+-]*)", depends)
        print(known[name]["Filename"], known[name]["SHA256"])
sys.exit("python3.14" not in known)
END

while read -r path sum; do
    file="$root/$(basename "$path")"
    [ -f "$file" ] || curl -fsS --max-time 40 -o "$file" "$mirror/$path" || skip "$path is not there"
    echo "$sum  $file" | sha256sum --check --quiet || skip "$path is not what the index says"
    dpkg-deb -x "$file" "$root/tree"
done <"$root/list"

libraries=$(dirname "$(find "$root/tree/usr/lib" -name "libc.so.6" | head -1)")
loader=$(find "$root/tree/usr/lib" "$root/tree/usr/lib64" -name "ld-linux*" 2>/dev/null | head -1)
python() {
    PYTHONHOME="$root/tree/usr" PYTHONPATH="$PWD:$root/site" PYTHONDONTWRITEBYTECODE=1 \
        timeout "$1" "$loader" --library-path "$libraries" "$root/tree/usr/bin/python3.14" "${@:2}"
}
python 20 -c "import ssl, sqlite3" || skip "Debian's Python does not run here"

python3 -m pip install -q --disable-pip-version-check --upgrade --target "$root/site" \
    --python-version 3.14 --implementation cp --abi cp314 --abi abi3 --abi none --only-binary :all: \
    --platform "manylinux_2_34_$(uname -m)" --platform "manylinux_2_28_$(uname -m)" \
    --platform "manylinux_2_17_$(uname -m)" --platform "manylinux2014_$(uname -m)" --platform any \
    annotated-types attrs "cattrs[msgspec]" falcon hypothesis msgspec nats-py pytest pytest-asyncio redis sybil \
    "uvicorn[standard]" websockets || skip "no packages for it"

# shellcheck disable=SC2086 - one word a test file
python 300 -m pytest -q -p no:cacheprovider $(printf 'tests/test_%s.py ' $tests)
