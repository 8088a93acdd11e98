//! What listens: one TCP socket for the API, one UDP socket per process, all on loopback, and the admin
//! socket in the run directory.

use crate::client::get;
use crate::process::{Cluster, RUN_DIR, send_signal, until};
use crate::recovery::recoveries;
use crate::turn;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Inodes of the sockets that a process has open.
fn socket_inodes(pid: u32) -> BTreeSet<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let inode = |link: std::path::PathBuf| {
        let name = link.to_str()?.to_owned();
        Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
    };
    links.filter_map(inode).collect()
}

/// Local addresses of these sockets that wait for anyone: TCP in state LISTEN (0A), UDP without a
/// peer (07).
fn waiting(table: &str, state: &str, inodes: &BTreeSet<String>) -> Vec<SocketAddr> {
    let text = fs::read_to_string(format!("/proc/net/{table}")).expect("the kernel lists sockets");
    let rows = text
        .lines()
        .skip(1)
        .map(|row| row.split_ascii_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row[3] == state && inodes.contains(row[9]));
    ours.map(|row| {
        let (ip, port) = row[1].split_once(':').expect("address:port");
        let port = u16::from_str_radix(port, 16).expect("a port");
        let ip = if table.ends_with('6') {
            let ip = u128::from_str_radix(ip, 16).expect("an address");
            IpAddr::from(ip.to_be_bytes()) // only asserted to be absent
        } else {
            let ip = u32::from_str_radix(ip, 16).expect("an address");
            Ipv4Addr::from(ip.to_le_bytes()).into()
        };
        SocketAddr::new(ip, port)
    })
    .collect()
}

/// Paths of the Unix sockets among these on which somebody waits for connections.
fn waiting_here(inodes: &BTreeSet<String>) -> Vec<String> {
    let text = fs::read_to_string("/proc/net/unix").expect("the kernel lists sockets");
    let rows = text
        .lines()
        .skip(1)
        .map(|row| row.split_ascii_whitespace().collect::<Vec<_>>());
    // Flag 0x10000: it accepts.
    let ours = rows.filter(|row| row[3] == "00010000" && inodes.contains(row[6]));
    ours.map(|row| row.get(7).unwrap_or(&"").to_string())
        .collect()
}

/// Asserts what listens of a cluster whose shards are on this host, or of its coordinator alone. Every cluster of
/// these tests is looked at this way when it has begun to serve.
pub(crate) fn nothing_else_listens(
    (coordinator, api): (u32, SocketAddr),
    shards: &[u32],
    models: usize,
) {
    let own = socket_inodes(coordinator);
    assert_eq!(waiting("tcp", "0A", &own), [api]);
    let admin = waiting_here(&own);
    assert!(
        admin.len() == 1 && admin[0].ends_with("/admin.sock"),
        "{admin:?}"
    );
    let control = waiting("udp", "07", &own);
    assert_eq!(control.len(), models, "one for each model: {control:?}");
    let mut all = own;
    for shard in shards {
        // One that was taken over lets go of its old link within seconds.
        until("a shard has one socket, its link's", || {
            waiting("udp", "07", &socket_inodes(*shard)).len() == 1
        });
        let own = socket_inodes(*shard);
        assert_eq!(waiting("tcp", "0A", &own), [], "a shard listens on TCP");
        assert_eq!(waiting_here(&own), [""; 0]);
        all.extend(own);
    }
    for table in ["tcp6", "udp6"] {
        for state in ["0A", "07"] {
            assert_eq!(waiting(table, state, &all), [], "{table}");
        }
    }
    if !shards.is_empty() {
        for address in waiting("udp", "07", &all) {
            assert!(address.ip().is_loopback(), "{address} is not on loopback");
        }
    }
}

#[test]
fn nothing_listens_but_the_api_and_the_control_plane_on_loopback() {
    let _turn = turn();
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let address = cluster.address;
    get(address, "/health");
    let before = recoveries(&cluster);
    send_signal(cluster.shards[1], Signal::KILL);
    until("it is replaced", || recoveries(&cluster) > before);
    // Also after a fault, and with clients there.
    nothing_else_listens((cluster.pid(), address), &cluster.children(), 1);
    let admin = format!("{RUN_DIR}/{}/admin.sock", address.port());
    assert_eq!(waiting_here(&socket_inodes(cluster.pid())), [admin]);
    cluster.stop();
}
