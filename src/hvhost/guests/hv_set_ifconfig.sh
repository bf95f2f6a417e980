#!/bin/sh
# Configures an interface as the host asks, for systemd-networkd. hv_kvp_daemon calls it with the
# file that holds the wish: DEVICE=, BOOTPROTO=, IPADDR0=, NETMASK0=, GATEWAY=, DNS1=, IPV6ADDR=,
# IPV6NETMASK=, IPV6_DEFAULTGW= and further ones with the next numbers.
#
# HVHOST_NETWORK_DIRECTORY is where the result goes, for tests.
set -eu

directory=${HVHOST_NETWORK_DIRECTORY:-/etc/systemd/network}

# Bits of a mask: 255.255.255.0, ffff:ffff:: or already a number.
prefix() {
    case $1 in
    *:*) base=0x separator=: ;;
    *.*) base='' separator=. ;;
    *) echo "$1" && return ;;
    esac
    bits=0
    for part in $(echo "$1" | tr "$separator" ' '); do
        part=$(($base$part))
        while [ "$part" -gt 0 ]; do
            bits=$((bits + part % 2)) part=$((part / 2))
        done
    done
    echo "$bits"
}

# "Address=" lines from a list of addresses and one of masks, in the same order.
addresses() {
    masks=$2
    for address in $1; do
        mask=${masks%% *} masks=${masks#* }
        echo "Address=$address/$(prefix "$mask")"
    done
}

device='' dhcp=no four='' four_masks='' six='' six_masks='' others=''
while IFS='=' read -r key value; do
    case $key in
    DEVICE) device=$value ;;
    BOOTPROTO) [ "$value" != dhcp ] || dhcp=ipv4 ;;
    IPADDR*) four="$four$value " ;;
    NETMASK*) four_masks="$four_masks$value " ;;
    IPV6ADDR*) six="$six$value " ;;
    IPV6NETMASK*) six_masks="$six_masks$value " ;;
    GATEWAY* | IPV6_DEFAULTGW*) others="${others}Gateway=$value
" ;;
    DNS*) others="${others}DNS=$value
" ;;
    esac
done <"$1"
[ -n "$device" ]

# The host says "DHCP" of IPv4 only; an interface with nothing of its own gets all there is.
[ "$dhcp" = no ] || [ -n "$six" ] || dhcp=yes
file=$directory/10-hyperv-$device.network
{
    printf '[Match]\nName=%s\n\n[Network]\nDHCP=%s\n' "$device" "$dhcp"
    [ "$dhcp" = yes ] || echo 'IPv6AcceptRA=no'
    addresses "$four" "$four_masks"
    addresses "$six" "$six_masks"
    printf '%s' "$others"
} >"$file.new"
mv "$file.new" "$file"
networkctl reload
networkctl reconfigure "$device"
