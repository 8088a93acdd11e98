//! What a host is: its cores, memory, limits and network interfaces, as its own kernel says.
//!
//! Reads `/proc` and `/sys`; judges nothing. Invariant: what cannot be read is absent, never invented.

use crate::gpus::Probe;
use crate::host::{HostCores, HostMemory};
use rustix::fs::statvfs;
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Version of the program that answers.
    pub version: String,
    /// Of its kernel.
    pub kernel: String,
    /// Cores that a process may use.
    pub cores: Vec<u32>,
    /// Threads that make sense: fewer where a quota says so.
    pub parallelism: u32,
    /// Bytes that can be taken without swapping.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Its GPUs, or why none can be used.
    pub gpus: Probe,
    /// Version of NCCL where it can be loaded, or why not.
    pub nccl: Result<String, String>,
    /// Version of the NVIDIA driver.
    pub driver: Option<String>,
    /// Most bytes a process may lock in memory; `None` is no limit.
    pub memlock: Option<u64>,
    /// Most files a process may open; `None` is no limit.
    pub nofile: Option<u64>,
    /// Bytes of `/dev/shm` that are free.
    pub shm_free_bytes: Option<u64>,
    /// Its network interfaces but for the loopback.
    pub interfaces: Vec<Interface>,
    /// Whether the address that others know it by is its own.
    pub has_address: bool,
    /// The interface that address is on.
    pub carrier: Option<String>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// As in `ip link`.
    pub name: String,
    /// Whether it is up.
    pub is_up: bool,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
    /// In Mbit/s, where its driver says.
    pub speed_mbit: Option<u32>,
}

/// What only a process that can reach devices knows.
#[derive(Clone, Debug)]
pub struct Devices {
    /// See [`HostReport::version`].
    pub version: String,
    /// See [`HostReport::gpus`].
    pub gpus: Probe,
    /// See [`HostReport::nccl`].
    pub nccl: Result<String, String>,
}

impl HostReport {
    /// Asks the operating system. `address` is how other nodes know this one.
    pub fn read(devices: Devices, address: IpAddr) -> Self {
        let cores = HostCores::read().unwrap_or_else(|_| HostCores::of_one_node(Vec::new(), 0));
        let memory = HostMemory::read().unwrap_or(HostMemory {
            free_bytes: 0,
            total_bytes: 0,
        });
        let shm = statvfs("/dev/shm").ok();
        Self {
            version: devices.version,
            kernel: line_of("/proc/sys/kernel/osrelease").unwrap_or_default(),
            cores: cores.allowed,
            parallelism: cores.parallelism,
            free_bytes: memory.free_bytes,
            total_bytes: memory.total_bytes,
            gpus: devices.gpus,
            nccl: devices.nccl,
            driver: line_of("/sys/module/nvidia/version"),
            memlock: getrlimit(Resource::Memlock).current,
            nofile: getrlimit(Resource::Nofile).current,
            shm_free_bytes: shm.map(|shm| shm.f_bavail.saturating_mul(shm.f_frsize)),
            interfaces: interfaces(),
            // Only what is this host's own can be bound.
            has_address: UdpSocket::bind((address, 0)).is_ok(),
            carrier: carrier(address),
        }
    }
}

fn line_of(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}

fn interfaces() -> Vec<Interface> {
    // Of this process's network, as opposed to /sys, which a namespace may have inherited.
    let text = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let names = names
        .map(|(name, _)| name.trim())
        .filter(|name| *name != "lo");
    let about = |name: &str, what: &str| line_of(&format!("/sys/class/net/{name}/{what}"));
    let interface = |name: &str| Interface {
        name: name.to_owned(),
        is_up: about(name, "operstate").is_none_or(|state| state != "down"),
        mtu: about(name, "mtu").and_then(|mtu| mtu.parse().ok()),
        speed_mbit: about(name, "speed").and_then(|speed| speed.parse().ok()),
    };
    names.map(interface).collect()
}

/// The interface whose network holds `address`.
fn carrier(address: IpAddr) -> Option<String> {
    if address.is_loopback() {
        return Some("lo".to_owned());
    }
    match address {
        IpAddr::V4(address) => on_link(&fs::read_to_string("/proc/self/net/route").ok()?, address),
        IpAddr::V6(address) => named(
            &fs::read_to_string("/proc/self/net/if_inet6").ok()?,
            address,
        ),
    }
}

/// The most exact route without a gateway. `/proc/net/route` has numbers in the host's byte order.
fn on_link(table: &str, address: Ipv4Addr) -> Option<String> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
        let (network, gateway, mask) = (number(1)?, number(2)?, number(7)?);
        let is_inside = u32::from_ne_bytes(address.octets()) & mask == network;
        (is_inside && gateway == 0 && mask != 0).then(|| (mask.count_ones(), fields[0].to_owned()))
    };
    let routes = table.lines().skip(1).filter_map(route);
    routes.max_by_key(|(bits, _)| *bits).map(|(_, name)| name)
}

/// `/proc/net/if_inet6`: address, index, prefix, scope, flags, name.
fn named(table: &str, address: Ipv6Addr) -> Option<String> {
    let wanted = format!("{:032x}", u128::from(address));
    let mut rows = table.lines().map(str::split_ascii_whitespace);
    rows.find_map(|mut row| (row.next()? == wanted).then(|| row.last())?)
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices {
            version: "1".into(),
            gpus: Err("none".into()),
            nccl: Err("none".into()),
        }
    }

    #[test]
    fn this_host_is_described() {
        let host = HostReport::read(devices(), Ipv4Addr::LOCALHOST.into());
        assert!(host.has_address && !host.cores.is_empty() && host.free_bytes > 1 << 20);
        assert_eq!(host.carrier.as_deref(), Some("lo"));
        let other = HostReport::read(devices(), [192, 0, 2, 1].into());
        assert!(!other.has_address, "192.0.2.0/24 is nobody's");
        let line = serde_json::to_string(&other).unwrap();
        assert_eq!(serde_json::from_str::<HostReport>(&line).unwrap(), other);
    }

    #[test]
    fn the_most_exact_network_without_a_gateway_carries_an_address() {
        let number = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let row = |name: &str, network, gateway, mask| {
            let [network, gateway, mask] = [network, gateway, mask].map(number);
            format!("{name} {network} {gateway} 0001 0 0 0 {mask} 0 0 0\n")
        };
        let none = [0; 4];
        let table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
            .to_owned()
            + &row("wan0", none, [10, 0, 0, 1], none)
            + &row("eth0", [10, 0, 0, 0], none, [255, 0, 0, 0])
            + &row("ib0", [10, 77, 0, 0], none, [255, 255, 0, 0]);
        let found = |address: [u8; 4]| on_link(&table, address.into());
        assert_eq!(found([10, 77, 1, 2]).as_deref(), Some("ib0"));
        assert_eq!(found([10, 78, 1, 2]).as_deref(), Some("eth0"));
        assert_eq!(found([192, 0, 2, 1]), None);
        let table = "fe800000000000000000000000000001 02 40 20 80 eth1\n";
        let address: Ipv6Addr = "fe80::1".parse().unwrap();
        assert_eq!(named(table, address).as_deref(), Some("eth1"));
    }
}
