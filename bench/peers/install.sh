#!/usr/bin/env bash
# Installs the peers of the benchmark beside the project, into .peers/ (Debian 12, as root; needs apt, PyPI and npm).
# No service is started. Each peer stands alone: one that cannot be had is said, and named in the report as missing.
set -uo pipefail
cd "$(dirname "$0")/../.."
peers=$PWD/.peers
scripts=$PWD/bench/peers
mkdir -p "$peers/debs"

missing() { echo "not installed: $*" >&2; }

export DEBIAN_FRONTEND=noninteractive
if [ ! -e /usr/sbin/policy-rc.d ]; then # the packages bring services; none of them is wanted here
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
fi
apt-get update -qq || echo "apt-get update failed: Debian's packages may be missing" >&2
apt-get install -qq --no-install-recommends postfix nginx libnginx-mod-mail libnginx-mod-stream >/dev/null </dev/null \
    || missing postfix nginx
# Debian allows one mail server at a time: the others are unpacked, not installed, with the libraries they need.
apt-get install -qq --no-install-recommends libevent-2.1-7 libgnutls-dane0 libnsl2 libidn12 >/dev/null </dev/null \
    || missing "libraries of opensmtpd and exim4"
if (cd "$peers/debs" && apt-get download -qq opensmtpd exim4-daemon-light exim4-base); then
    for package in "$peers"/debs/*.deb; do dpkg -x "$package" "$peers/root"; done
    for user in opensmtpd opensmtpq Debian-exim; do
        id "$user" >/dev/null 2>&1 \
            || adduser --quiet --system --group --no-create-home --home /var/lib/opensmtpd/empty --force-badname "$user"
    done
    mkdir -p /var/lib/opensmtpd/empty
else
    missing opensmtpd exim4
fi

# python-slimta wants its own versions of what the relay uses too.
python3 -m venv "$peers/venv" && "$peers/venv/bin/pip" install -q --disable-pip-version-check \
    aiosmtpd==1.4.6 python-slimta==5.0.5 gevent==26.9.0 || missing aiosmtpd python-slimta
mkdir -p "$peers/node" && cp "$scripts/package.json" "$peers/node/" \
    && (cd "$peers/node" && npm install --no-audit --no-fund --loglevel=error) || missing Haraka nodemailer
