#!/usr/bin/env bash
# A private CA, and a certificate for each node, so that nodes talk to each other by TLS (gRPC; the dashboard needs an
# ingress). Keys are readable by their owner only; ca.key stays where it was made and goes to no node.
#
#   cluster/tls.sh FOLDER head=10.0.0.10 node1=10.0.0.11,node1.example.org …
#
# Then on each node: RAY_USE_TLS=1 RAY_TLS_CA_CERT=ca.crt RAY_TLS_SERVER_CERT=NODE.crt RAY_TLS_SERVER_KEY=NODE.key
# Run again with new nodes it keeps the CA and makes what is missing. A certificate is good for DAYS (90).
set -euo pipefail
umask 077
DAYS=${DAYS:-90}

[[ $# -ge 2 ]] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
folder=$1
shift
mkdir -p "$folder"
cd "$folder"

if [[ ! -e ca.key ]]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 3650 \
        -subj "/CN=malaria_ray private CA" -addext basicConstraints=critical,CA:TRUE,pathlen:0 \
        -addext keyUsage=critical,keyCertSign 2>/dev/null
fi
for node in "$@"; do
    name=${node%%=*} names=127.0.0.1,localhost,${node#*=}
    [[ $node == *=* && $name =~ ^[A-Za-z0-9.-]+$ ]] || { echo "tls.sh: '$node' is not NAME=ADDRESS,…" >&2; exit 2; }
    [[ ! -e $name.crt ]] || continue
    alternatives=
    for each in ${names//,/ }; do
        kind=DNS
        [[ ! $each =~ ^[0-9.]+$|: ]] || kind=IP
        alternatives+=${alternatives:+,}$kind:$each
    done
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$name.key" -out "$name.csr" \
        -subj "/CN=$name" 2>/dev/null
    openssl x509 -req -in "$name.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -out "$name.crt" -days "$DAYS" \
        -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n' \
            "$alternatives") 2>/dev/null
    rm "$name.csr"
    echo "$name.crt: $alternatives, $DAYS days"
done
