#!/bin/sh
# Build a free-threaded Python 3.13 from Debian's source package into the folder named on the command line.
# It needs what builds any Python: a C compiler, dpkg-dev, and the headers of OpenSSL, SQLite, libffi and zlib.
set -eu
folder=$1
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
chmod 755 "$build" # apt downloads as another user
mkdir -p "$build/lists/partial" "$build/sources"

# The configured sources of packages, read as sources of source packages, beside the machine's own lists.
for source in /etc/apt/sources.list.d/*.sources; do
    sed 's/^Types:.*/Types: deb-src/' "$source" > "$build/sources/${source##*/}"
done
apt="apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$build/sources
    -o Dir::State::lists=$build/lists"

cd "$build"
$apt update
$apt source --only-source python3.13
cd python3.13-*
# Debian's search path of an environment lacks the t of lib/python3.13t.
sed -i 's/"python%d.%d" % sys.version_info\[:2\]/f"python{ver[0]}.{ver[1]}{abi_thread}"/' Lib/site.py
./configure --quiet --disable-gil --disable-test-modules --without-ensurepip \
    --prefix="$folder"
nice make --silent -j"$(nproc)"
make --silent install
