//! What the nodes' answers mean: a finding for each thing that was looked at, with what to do.
//!
//! Pure: answers in, findings out. Invariant: `fail` only for what would keep a cluster from starting or
//! from saying the same on all nodes.

use super::nodes::{Digests, Measured, Place, Seen, groups};
use super::{EVERYWHERE, Finding, Level};
use std::collections::BTreeSet;
use topology::examine::Speed;
use topology::examine::host::{HostReport, Interface};
use topology::fit::Bytes;
use topology::manifest::MANIFEST_FILE;
use topology::placement::Device;

/// A clock that is further off puts lines of `cluster logs` in a wrong order.
const CLOCK_SECONDS: f64 = 0.5;
/// Connections, files of a model, pipes to shards.
const LEAST_NOFILE: u64 = 1024;
/// What NCCL and network cards lock.
const LEAST_GPU_MEMLOCK: u64 = 1 << 30;
/// What collectives of one host need of `/dev/shm`: a few MiB for CPU ranks, NCCL's buffers for GPUs.
const LEAST_SHM: u64 = 64 << 20;
const LEAST_GPU_SHM: u64 = 1 << 30;
/// An all-reduce slower than that is what a step spends its time on.
const SLOW_SECONDS: f64 = 1e-3;
const SLOW_BYTES_PER_SECOND: f64 = 100e6;

/// What is to be said of one node.
pub(super) fn node(place: &Place, seen: &Seen) -> Vec<Finding> {
    let say = |level, check, text: String| Finding::new(level, &place.name, check, text);
    let mut findings = vec![say(
        Level::Ok,
        "program",
        format!("{}, Linux {}", seen.host.version, seen.host.kernel),
    )];
    if let Some(reach) = &seen.reach {
        let (level, text) = match reach {
            Ok(seconds) => (
                Level::Ok,
                format!(
                    "the coordinator answers over UDP in {:.2} ms",
                    seconds * 1e3
                ),
            ),
            Err(why) => (
                Level::Fail,
                format!(
                    "no datagram comes back from the coordinator ({why}); let UDP through between this \
                     node and `address` of [coordinator]"
                ),
            ),
        };
        findings.push(say(level, "control", text));
    }
    for (check, (level, text)) in [
        ("device", device(place, &seen.host)),
        ("memory", memory(&seen.host)),
        ("limits", limits(place, &seen.host)),
        ("clock", clock(seen.clock)),
    ] {
        findings.push(say(level, check, text));
    }
    if place.address.is_some() {
        let (level, text) = interface(place, &seen.host);
        findings.push(say(level, "interface", text));
    }
    for why in seen
        .models
        .values()
        .filter_map(|digest| digest.as_ref().err())
    {
        let text = format!("{why}; put the model there, or change `path` of [[model]]");
        findings.push(say(Level::Fail, "model", text));
    }
    findings
}

fn has_gpu(place: &Place) -> bool {
    let is_gpu = |device: &Device| matches!(device, Device::Gpu { .. });
    place.devices.iter().any(is_gpu)
}

fn device(place: &Place, host: &HostReport) -> (Level, String) {
    if has_gpu(place) {
        let is_alone = place.devices.len() == 1 && !place.joins_nodes;
        return match &host.gpus {
            Err(why) => (Level::Fail, why.clone()),
            Ok(gpus) => match gpus.memory_of(&place.devices, is_alone) {
                Err(why) => (Level::Fail, why),
                Ok(bytes) => {
                    let driver = host.driver.as_deref().unwrap_or("of unknown version");
                    let nccl = host.nccl.as_deref().map_or_else(
                        |_| String::new(), // which is a finding of its own
                        |version| format!(", NCCL {version}"),
                    );
                    let least = Bytes(bytes.into_iter().min().unwrap_or_default());
                    let count = place.devices.len();
                    (
                        Level::Ok,
                        format!(
                            "{count} of {} GPUs taken, {least} or more each, driver {driver}{nccl}",
                            gpus.gpus.len()
                        ),
                    )
                }
            },
        };
    }
    let (mut threads, mut missing) = (0, Vec::<u32>::new());
    for device in &place.devices {
        if let Device::Cpu {
            threads: own,
            cores,
        } = device
        {
            threads += own;
            missing.extend(
                cores
                    .iter()
                    .copied()
                    .filter(|core| !host.cores.contains(core)),
            );
        }
    }
    let has = host.cores.len();
    if !missing.is_empty() {
        let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
        let text = format!(
            "core {} may not be used there ({has} may); change `cpus`",
            missing.join(", ")
        );
        return (Level::Fail, text);
    }
    if threads > host.parallelism {
        let text = format!(
            "{threads} threads on {} cores take turns; lower `cpus`",
            host.parallelism
        );
        return (Level::Warn, text);
    }
    let gpus = match &host.gpus {
        Ok(gpus) => format!(", {} GPUs", gpus.gpus.len()),
        Err(_) if host.driver.is_some() => ", an NVIDIA driver".to_owned(),
        Err(_) => String::new(),
    };
    let taken = match threads {
        0 => String::new(),
        threads => format!("; {threads} taken"),
    };
    (Level::Ok, format!("{has} cores{gpus}{taken}"))
}

fn memory(host: &HostReport) -> (Level, String) {
    let (free, total) = (Bytes(host.free_bytes), Bytes(host.total_bytes));
    let text = format!("{free} of {total} free");
    // Below a twentieth the next allocation of anyone brings the machine to its knees.
    if host.free_bytes < host.total_bytes / 20 {
        return (Level::Warn, text + "; end what takes the rest");
    }
    (Level::Ok, text)
}

fn limits(place: &Place, host: &HostReport) -> (Level, String) {
    let shown = |limit: Option<u64>| limit.map_or_else(|| "unlimited".into(), |n| n.to_string());
    let bytes = |n: Option<u64>| n.map_or_else(|| "unlimited".into(), |n| Bytes(n).to_string());
    let mut advice = Vec::new();
    if host.nofile.is_some_and(|limit| limit < LEAST_NOFILE) {
        advice.push(format!(
            "raise `ulimit -n` (LimitNOFILE) to {LEAST_NOFILE} or more"
        ));
    }
    let gpu = has_gpu(place);
    if gpu && host.memlock.is_some_and(|limit| limit < LEAST_GPU_MEMLOCK) {
        advice.push("set `ulimit -l` (LimitMEMLOCK) to unlimited".to_owned());
    }
    let needed = if gpu { LEAST_GPU_SHM } else { LEAST_SHM };
    if place.devices.len() > 1 && host.shm_free_bytes.is_none_or(|free| free < needed) {
        advice.push(format!("give /dev/shm {} or more", Bytes(needed)));
    }
    let shm = host
        .shm_free_bytes
        .map_or_else(|| "missing".into(), |free| Bytes(free).to_string());
    let text = format!(
        "{} open files, {} locked memory, /dev/shm {shm}",
        shown(host.nofile),
        bytes(host.memlock)
    );
    if advice.is_empty() {
        return (Level::Ok, text);
    }
    (Level::Warn, format!("{text}; {}", advice.join("; ")))
}

fn clock((ahead, exact): (f64, f64)) -> (Level, String) {
    let off = ahead.abs();
    let side = if ahead < 0.0 { "behind" } else { "ahead" };
    if off > CLOCK_SECONDS + exact {
        let text = format!(
            "{off:.1} s {side}; set it (chrony, systemd-timesyncd), or logs of nodes cannot be compared"
        );
        return (Level::Warn, text);
    }
    let text = format!(
        "{:.1} ms {side}, give or take {:.1} ms",
        off * 1e3,
        exact * 1e3
    );
    (Level::Ok, text)
}

fn interface(place: &Place, host: &HostReport) -> (Level, String) {
    let address = place
        .address
        .map_or_else(String::new, |address| address.to_string());
    let names: Vec<_> = host.interfaces.iter().map(|i| i.name.as_str()).collect();
    let names = names.join(", ");
    if !host.has_address {
        let text = format!("{address} is not its own; change `address` (it has {names})");
        return (Level::Fail, text);
    }
    let find = |name: &str| host.interfaces.iter().find(|i| i.name == name);
    let carrier = host.carrier.as_deref();
    if let Some(wanted) = &place.interface {
        match find(wanted) {
            None => {
                let text = format!("there is no {wanted}; change `interface` (it has {names})");
                return (Level::Fail, text);
            }
            Some(Interface { is_up: false, .. }) => {
                return (Level::Fail, format!("{wanted} is down; see `ip link`"));
            }
            Some(_) if carrier.is_some_and(|carrier| carrier != wanted) => {
                let text = format!(
                    "NCCL takes {wanted}, but {address} is on {}; make `address` and `interface` agree",
                    carrier.unwrap_or_default()
                );
                return (Level::Warn, text);
            }
            Some(_) => {}
        }
    }
    let about = place.interface.as_deref().or(carrier).and_then(find);
    let about = about.map_or_else(String::new, |interface| {
        let mtu = interface
            .mtu
            .map_or_else(String::new, |mtu| format!(", MTU {mtu}"));
        let speed = interface.speed_mbit;
        let speed = speed.map_or_else(String::new, |speed| format!(", {speed} Mbit/s"));
        format!("{mtu}{speed}")
    });
    let text = format!(
        "{address} is on {}{about}",
        carrier.unwrap_or("an interface")
    );
    (Level::Ok, text)
}

/// What is to be said of all nodes together. `own` are models of this machine that it was not asked for as one
/// of them.
pub(super) fn together(
    nodes: &[(&Place, &Seen)],
    (own, measured): (&Digests, &[Measured]),
) -> Vec<Finding> {
    let directories = nodes.iter().flat_map(|(_, seen)| seen.models.keys());
    let directories: BTreeSet<&String> = directories.collect();
    let models = directories.iter().filter_map(|it| model(nodes, own, it));
    let mut findings: Vec<_> = models.collect();
    if directories.is_empty() {
        let text = "the built-in one, a part of the program";
        findings.push(Finding::new(Level::Ok, EVERYWHERE, "model", text));
    }
    findings.extend(libraries(nodes));
    let with_gpus = nodes.iter().filter(|(place, _)| has_gpu(place));
    let with_gpus: BTreeSet<&str> = with_gpus.map(|(place, _)| place.name.as_str()).collect();
    findings.extend(measured.iter().filter_map(|group| {
        let mut nodes = group.speeds.iter().map(|(node, _)| node.as_str());
        all_reduce(group, nodes.all(|node| with_gpus.contains(node)))
    }));
    findings
}

/// Whether a model is the same wherever it is read; `None` where it cannot be read somewhere, which is a
/// finding already.
fn model(nodes: &[(&Place, &Seen)], own: &Digests, directory: &str) -> Option<Finding> {
    let say = |level, text: String| {
        let text = format!("{directory}: {text}");
        Some(Finding::new(level, EVERYWHERE, "model", text))
    };
    let here = own.get(directory).map(|digest| ("this machine", digest));
    let there = nodes.iter().filter_map(|(place, seen)| {
        let digest = seen.models.get(directory)?;
        Some((place.name.as_str(), digest))
    });
    let digests = here.into_iter().chain(there);
    let digests = digests.map(|(name, digest)| Some((name, digest.as_ref().ok()?)));
    let digests = digests.collect::<Option<Vec<_>>>()?;
    let (first, rest) = digests.split_first()?;
    let differing = rest.iter().filter_map(|(name, digest)| {
        let files = first.1.differences(digest);
        (!files.is_empty()).then(|| format!("{name} has another {}", files.join(", ")))
    });
    let differing: Vec<_> = differing.collect();
    if differing.is_empty() {
        let (count, summary) = (first.1.files.len(), first.1.summary());
        let listed = if first.1.files.contains_key(MANIFEST_FILE) {
            ", with a SHA256SUMS"
        } else {
            ""
        };
        let text = format!("the same on every node: {count} files, {summary}{listed}");
        return say(Level::Ok, text);
    }
    let text = format!(
        "not the same on every node: compared with {}, {}; copy the model anew",
        first.0,
        differing.join("; ")
    );
    say(Level::Fail, text)
}

/// NCCL refuses ranks with another version; drivers only should be the same.
fn libraries(nodes: &[(&Place, &Seen)]) -> Vec<Finding> {
    let gpus: Vec<_> = nodes.iter().filter(|(place, _)| has_gpu(place)).collect();
    let mut findings = Vec::new();
    for (place, seen) in &gpus {
        if let Err(why) = &seen.host.nccl {
            findings.push(Finding::new(Level::Fail, &place.name, "nccl", why.clone()));
        }
    }
    if gpus.len() < 2 {
        return findings;
    }
    let named = |value: fn(&HostReport) -> Option<String>| {
        let values = gpus
            .iter()
            .filter_map(move |(place, seen)| Some((place.name.as_str(), value(&seen.host)?)));
        groups(values)
    };
    for (check, versions, bad) in [
        ("nccl", named(|host| host.nccl.clone().ok()), Level::Fail),
        ("driver", named(|host| host.driver.clone()), Level::Warn),
    ] {
        let all = versions
            .iter()
            .map(|(version, nodes)| format!("{version} on {}", nodes.join(", ")));
        let all: Vec<_> = all.collect();
        let (level, advice) = match versions.len() {
            0 => continue,
            1 => (Level::Ok, ""),
            _ => (bad, "; install the same version on every node"),
        };
        let text = format!("{}{advice}", all.join("; "));
        findings.push(Finding::new(level, EVERYWHERE, check, text));
    }
    findings
}

/// How the sums over the nodes of a model went.
fn all_reduce(group: &Measured, on_gpus: bool) -> Option<Finding> {
    let say = |level, text: String| Some(Finding::new(level, EVERYWHERE, "all-reduce", text));
    let mut slowest: Option<Speed> = None;
    for (node, result) in &group.speeds {
        match result {
            Err(why) => {
                let text = format!(
                    "{node}: {why}; let TCP through between the nodes' `address`es, on any port"
                );
                return say(Level::Fail, text);
            }
            Ok(speed) => {
                let so_far = slowest.unwrap_or(*speed);
                slowest = Some(Speed {
                    latency_seconds: so_far.latency_seconds.max(speed.latency_seconds),
                    bytes_per_second: so_far.bytes_per_second.min(speed.bytes_per_second),
                });
            }
        }
    }
    let speed = slowest?;
    let names: Vec<&str> = group.speeds.iter().map(|(node, _)| node.as_str()).collect();
    let text = format!(
        "over {} nodes ({}): {:.3} ms for 1 KiB, {:.0} MB/s for 4 MiB",
        names.len(),
        names.join(", "),
        speed.latency_seconds * 1e3,
        speed.bytes_per_second / 1e6
    );
    if on_gpus {
        // What it says is that the nodes reach each other.
        let text = format!("{text}, by TCP and the CPU; GPUs will use NCCL on each `interface`");
        return say(Level::Ok, text);
    }
    if speed.latency_seconds > SLOW_SECONDS || speed.bytes_per_second < SLOW_BYTES_PER_SECOND {
        let advice =
            "every layer needs two of them: take a faster network (`address`), or fewer nodes";
        return say(Level::Warn, format!("{text}; {advice}"));
    }
    say(Level::Ok, text)
}

#[cfg(test)]
mod tests;
