//! Each thing that can be wrong with a node is one finding, and what is right is none.

use super::*;
use std::collections::BTreeMap;
use topology::examine::model::ModelDigest;
use topology::gpus::{Gpu, GpuHost};

const MODEL: &str = "/m";

fn place(name: &str, device: Device) -> Place {
    Place {
        name: name.into(),
        address: Some([10, 0, 0, 1].into()),
        interface: Some("eth0".into()),
        devices: vec![device.clone(), device],
        joins_nodes: true,
        ..Place::here()
    }
}

fn cpu() -> Device {
    let (threads, cores) = (1, vec![0]);
    Device::Cpu { threads, cores }
}

fn seen() -> Seen {
    let nic = |name: &str| Interface {
        name: name.into(),
        is_up: true,
        mtu: Some(1500),
        speed_mbit: None,
    };
    let gpu = Gpu {
        name: "GPU".into(),
        total_bytes: 80 << 30,
    };
    Seen {
        host: HostReport {
            version: "1".into(),
            kernel: "6".into(),
            cores: vec![0, 1],
            parallelism: 2,
            free_bytes: 8 << 30,
            total_bytes: 16 << 30,
            gpus: Ok(GpuHost {
                gpus: vec![gpu],
                visible: None,
                nccl: Ok("/libnccl.so.2".into()),
            }),
            nccl: Ok("2.30.7".into()),
            driver: Some("580.1".into()),
            memlock: None,
            nofile: Some(1 << 20),
            shm_free_bytes: Some(8 << 30),
            interfaces: vec![nic("eth0"), nic("ib0")],
            has_address: true,
            carrier: Some("eth0".into()),
        },
        clock: (0.001, 0.002),
        models: Digests::from([(
            MODEL.into(),
            Ok(ModelDigest {
                files: BTreeMap::from([("config.json".into(), "a".into())]),
            }),
        )]),
        reach: Some(Ok(0.0002)),
    }
}

/// A sum over nodes `a` and `b`, whose second rank measured this.
fn measured(speed: Result<f64, String>) -> Measured {
    let of = |latency_seconds| Speed {
        latency_seconds,
        bytes_per_second: 1e9,
    };
    let speeds = vec![("a".into(), Ok(of(1e-4))), ("b".into(), speed.map(of))];
    Measured { speeds }
}

/// What is found on two nodes of which the second is like this.
fn found(
    device: &Device,
    spoil: impl FnOnce(&mut Place, &mut Seen),
    group: Measured,
) -> Vec<Finding> {
    let (one, mut other) = (place("a", device.clone()), place("b", device.clone()));
    let (seen_one, mut seen_other) = (seen(), seen());
    spoil(&mut other, &mut seen_other);
    let mut findings = node(&other, &seen_other);
    findings.extend(together(
        &[(&one, &seen_one), (&other, &seen_other)],
        (&Digests::new(), &[group]),
    ));
    findings.retain(|finding| finding.level != Level::Ok);
    findings
}

#[test]
fn good_nodes_are_good() {
    let well = || measured(Ok(1e-4));
    assert_eq!(found(&cpu(), |_, _| {}, well()), []);
    let gpu = Device::Gpu { index: 0, ranks: 1 };
    assert_eq!(found(&gpu, |_, _| {}, well()), []);
    let findings = node(&place("a", gpu), &seen());
    let device = findings.iter().find(|finding| finding.check == "device");
    let said = &device.expect("GPUs were looked at").text;
    for part in ["2 of 1 GPUs", "80.0 GiB", "driver 580.1", "NCCL 2.30.7"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

/// Makes one thing wrong.
fn spoil(what: &str, place: &mut Place, seen: &mut Seen) {
    let host = &mut seen.host;
    match what {
        "no datagrams" => seen.reach = Some(Err("no".into())),
        "core 0 forbidden" => host.cores = vec![1],
        "one core" => host.parallelism = 1,
        "memory full" => host.free_bytes = 1,
        "few files" => host.nofile = Some(256),
        "no /dev/shm" => host.shm_free_bytes = None,
        "nothing locked" => host.memlock = Some(65536),
        "no driver" => host.gpus = Err("there is no driver".into()),
        "no NCCL" => host.nccl = Err("there is no libnccl".into()),
        "other NCCL" => host.nccl = Ok("2.29.1".into()),
        "other driver" => host.driver = Some("570".into()),
        "clock" => seen.clock = (-60.0, 0.1),
        "address" => host.has_address = false,
        "no interface" => place.interface = Some("eth9".into()),
        "interface down" => host.interfaces[0].is_up = false,
        "other interface" => place.interface = Some("ib0".into()),
        "other model" => {
            let files = BTreeMap::from([("config.json".into(), "b".into())]);
            seen.models = Digests::from([(MODEL.into(), Ok(ModelDigest { files }))]);
        }
        "no model" => {
            let missing = Err("it has no config.json".into());
            seen.models = Digests::from([(MODEL.into(), missing)]);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn each_thing_that_is_wrong_is_one_finding_that_says_what_to_do() {
    use Level::{Fail, Warn};
    let gpu = Device::Gpu { index: 0, ranks: 1 };
    for (device, what, level, check, said) in [
        (&cpu(), "no datagrams", Fail, "control", "UDP"),
        (&cpu(), "core 0 forbidden", Fail, "device", "change `cpus`"),
        (&cpu(), "one core", Warn, "device", "lower `cpus`"),
        (&cpu(), "memory full", Warn, "memory", "end what takes"),
        (&cpu(), "few files", Warn, "limits", "ulimit -n"),
        (&cpu(), "no /dev/shm", Warn, "limits", "/dev/shm"),
        (&gpu, "nothing locked", Warn, "limits", "ulimit -l"),
        (&gpu, "no driver", Fail, "device", "no driver"),
        (&gpu, "no NCCL", Fail, "nccl", "libnccl"),
        (&gpu, "other NCCL", Fail, "nccl", "2.30.7 on a"),
        (&gpu, "other driver", Warn, "driver", "580.1 on a"),
        (&cpu(), "clock", Warn, "clock", "60.0 s behind"),
        (&cpu(), "address", Fail, "interface", "change `address`"),
        (&cpu(), "no interface", Fail, "interface", "no eth9"),
        (&cpu(), "interface down", Fail, "interface", "is down"),
        (&cpu(), "other interface", Warn, "interface", "on eth0"),
        (&cpu(), "other model", Fail, "model", "b has another config"),
        (&cpu(), "no model", Fail, "model", "put the model there"),
    ] {
        let well = measured(Ok(1e-4));
        let findings = found(device, |place, seen| spoil(what, place, seen), well);
        let [finding] = findings.as_slice() else {
            panic!("{what}: {findings:?}");
        };
        let expected = (level, check);
        assert_eq!((finding.level, finding.check), expected, "{finding:?}");
        assert!(finding.text.contains(said), "{finding:?}");
    }
}

#[test]
fn each_group_of_nodes_is_judged_by_itself() {
    let gpu = Device::Gpu { index: 0, ranks: 1 };
    for (device, group, said) in [
        (&cpu(), measured(Ok(1e-4)), None),
        (
            &cpu(),
            measured(Ok(0.02)),
            Some((Level::Warn, "(a, b): 20.000 ms")),
        ),
        (&gpu, measured(Ok(0.02)), None), // which are not to use that path
        (
            &cpu(),
            measured(Err("no".into())),
            Some((Level::Fail, "b: no; let TCP through")),
        ),
    ] {
        let findings = found(device, |_, _| {}, group);
        let found = findings.iter().find(|it| it.check == "all-reduce");
        assert_eq!(
            found.map(|it| it.level),
            said.map(|(level, _)| level),
            "{findings:?}"
        );
        let text = found.map_or("", |it| it.text.as_str());
        assert!(text.contains(said.map_or("", |(_, text)| text)), "{text}");
    }
    let (one, other) = (place("a", cpu()), place("b", cpu()));
    let nodes = [(&one, &seen()), (&other, &seen())];
    let groups = [measured(Ok(1e-4)), measured(Ok(0.02)), measured(Ok(1e-4))];
    let findings = together(&nodes, (&Digests::new(), &groups));
    let levels = findings.iter().filter(|it| it.check == "all-reduce");
    let levels: Vec<Level> = levels.map(|it| it.level).collect();
    assert_eq!(levels, [Level::Ok, Level::Warn, Level::Ok]);
}

#[test]
fn the_coordinators_own_model_is_compared_too() {
    let node = place("a", cpu());
    let files = BTreeMap::from([("tokenizer.json".into(), "x".into())]);
    let own = Digests::from([(MODEL.into(), Ok(ModelDigest { files }))]);
    let findings = together(&[(&node, &seen())], (&own, &[]));
    let said = findings.iter().find(|finding| finding.check == "model");
    let said = said.expect("models were compared");
    assert_eq!(said.level, Level::Fail);
    let expected = "compared with this machine, a has another config.json, tokenizer.json";
    assert!(said.text.contains(expected), "{said:?}");
}
