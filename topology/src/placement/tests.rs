//! Who gets which device, and what is refused with which arithmetic.

use super::*;
use crate::random::{Random, seed};

fn host(cores: u32) -> HostCores {
    HostCores::of_one_node((0..cores).collect(), cores)
}

fn request(cpus: Option<&str>, ranks: Option<u32>) -> DeviceRequest {
    DeviceRequest {
        gpus: None,
        cpus: cpus.map(|cpus| cpus.parse().unwrap()),
        tensor_parallel_size: ranks,
    }
}

/// The placement of the only model, and how many warnings there are.
fn one(request: &DeviceRequest, host: &HostCores) -> (Placement, Vec<String>) {
    let mut placed = place(request, 1, host).unwrap();
    (placed.models.remove(0), placed.warnings)
}

fn threads(placement: &Placement) -> Vec<u32> {
    let threads = |device: &Device| match device {
        Device::Cpu { threads, .. } => *threads,
        Device::Gpu { .. } => panic!("a GPU"),
    };
    placement.devices.iter().map(threads).collect()
}

#[test]
fn cores_are_divided_among_ranks() {
    let threads = |cpus, ranks, cores| {
        let (placement, warnings) = one(&request(cpus, ranks), &host(cores));
        (threads(&placement), warnings.len())
    };
    assert_eq!(threads(None, None, 8), (vec![4, 4], 0));
    assert_eq!(threads(None, None, 1), (vec![1], 0));
    assert_eq!(threads(Some("2"), Some(1), 2), (vec![2], 0));
    assert_eq!(
        threads(Some("4"), Some(4), 2),
        (vec![1, 1, 1, 1], 1),
        "a warning, no error"
    );
    assert_eq!(threads(Some("7"), Some(3), 8), (vec![3, 2, 2], 0));
    assert_eq!(threads(None, Some(4), 2), (vec![1, 1, 1, 1], 1));
    assert_eq!(threads(Some("2"), Some(4), 8), (vec![1, 1, 1, 1], 0));
    assert_eq!(threads(Some("1"), None, 8), (vec![1], 0));
}

#[test]
fn named_cores_are_pinned_in_order() {
    let (placement, _) = one(&request(Some("3,0-1"), None), &host(4));
    let shown: Vec<_> = placement
        .ranks()
        .map(|(rank, device)| format!("{rank}: {device}"))
        .collect();
    assert_eq!(shown, ["0: CPU cores 3,0", "1: CPU core 1"]);
    let refused = place(&request(Some("1-4"), None), 1, &host(4))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("core 4") && refused.contains("0-3"),
        "{refused}"
    );
    let refused = place(&request(Some("0,1"), Some(3)), 1, &host(4))
        .unwrap_err()
        .to_string();
    assert!(refused.contains("2 cores for 3 ranks"), "{refused}");
    assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
}

#[test]
fn counted_cores_are_those_of_a_numa_node() {
    let nodes = |count: u32| HostCores {
        nodes: (0..count)
            .map(|node| vec![2 * node, 2 * node + 1, 20 + node])
            .collect(),
        ..HostCores::of_one_node((0..20 + count).collect(), 3 * count)
    };
    let shown = |cpus, ranks, host: &HostCores| {
        let (placement, warnings) = one(&request(cpus, ranks), host);
        let devices: Vec<_> = placement.devices.iter().map(ToString::to_string).collect();
        (devices.join("; "), warnings.len())
    };
    let two = nodes(2);
    let each = "CPU cores 0-1,20; CPU cores 2-3,21".to_owned();
    assert_eq!(shown(None, None, &two), (each.clone(), 0));
    assert_eq!(shown(Some("6"), Some(2), &two), (each, 0));
    let fewer = "CPU cores 0-1,20, 2 threads; CPU cores 2-3,21, 2 threads".to_owned();
    assert_eq!(shown(Some("4"), Some(2), &two), (fewer, 0));
    assert_eq!(shown(None, Some(1), &two), ("CPU, 6 threads".to_owned(), 0));
    let shared = shown(Some("4"), Some(4), &two).0;
    assert_eq!(shared.matches("0-1,20, 1 thread").count(), 2, "{shared}");
    assert_eq!(shared.matches("2-3,21, 1 thread").count(), 2, "{shared}");
    // As many ranks as nodes, or the power of two below.
    assert_eq!(
        threads(&one(&request(None, None), &nodes(4)).0),
        [3, 3, 3, 3]
    );
    assert_eq!(threads(&one(&request(None, None), &nodes(3)).0), [5, 4]);
    // Named cores are what they are.
    assert_eq!(
        shown(Some("0-3"), None, &two),
        ("CPU cores 0-1; CPU cores 2-3".to_owned(), 0)
    );
    assert_eq!(shown(Some("1-2,20-21"), None, &two).1, 2);
}

#[test]
fn each_gpu_is_a_rank() {
    let mut request = DeviceRequest {
        gpus: Some("2,0".parse().unwrap()),
        ..DeviceRequest::default()
    };
    let (placement, warnings) = one(&request, &host(2));
    assert_eq!(
        placement.devices,
        [2, 0].map(|index| Device::Gpu { index, ranks: 1 })
    );
    assert_eq!(warnings, [""; 0]);
    request.tensor_parallel_size = Some(4);
    assert!(
        place(&request, 1, &host(2))
            .unwrap_err()
            .to_string()
            .contains("2 GPUs")
    );
    request.tensor_parallel_size = None;
    request.cpus = Some(CpuSpec::Count(1));
    assert_eq!(place(&request, 1, &host(2)), Err(PlacementError::BothKinds));
    for ranks in [0, MAX_WORLD_SIZE + 1] {
        let request = DeviceRequest {
            tensor_parallel_size: Some(ranks),
            ..DeviceRequest::default()
        };
        assert_eq!(
            place(&request, 1, &host(2)),
            Err(PlacementError::WorldSize(ranks))
        );
    }
}

#[test]
fn a_gpu_that_is_named_twice_is_shared_and_warned_about() {
    let request = DeviceRequest {
        gpus: Some("1,0,1".parse().unwrap()),
        ..DeviceRequest::default()
    };
    let (placement, warnings) = one(&request, &host(2));
    let ranks = [(1, 2), (0, 1), (1, 2)];
    assert_eq!(
        placement.devices,
        ranks.map(|(index, ranks)| Device::Gpu { index, ranks })
    );
    assert_eq!(warnings.len(), 1, "once for each GPU");
    assert!(warnings[0].contains("GPU 1 2 times"), "{warnings:?}");
    let request = DeviceRequest {
        gpus: Some("0-1024".parse().unwrap()),
        ..DeviceRequest::default()
    };
    let refused = place(&request, 1, &host(2)).unwrap_err();
    assert_eq!(refused, PlacementError::TooManyGpus(1025));
}

#[test]
fn devices_are_dealt_out_to_models_in_order_or_refused_with_the_arithmetic() {
    let gpus = |list: &str, ranks, models| {
        let request = DeviceRequest {
            gpus: Some(list.parse().unwrap()),
            cpus: None,
            tensor_parallel_size: ranks,
        };
        let placed = place(&request, models, &host(2)).map_err(|e| e.to_string())?;
        let numbers = |placement: &Placement| -> Vec<String> {
            placement.devices.iter().map(ToString::to_string).collect()
        };
        Ok::<_, String>(placed.models.iter().map(numbers).collect::<Vec<_>>())
    };
    let pairs = [["GPU 3", "GPU 2"], ["GPU 1", "GPU 0"]];
    assert_eq!(gpus("3,2,1,0", None, 2).unwrap(), pairs);
    assert_eq!(gpus("3,2,1,0", Some(2), 2).unwrap(), pairs);
    assert_eq!(gpus("0-63,64-127", None, 2).unwrap()[1].len(), 64);
    for (list, ranks, models, said) in [
        ("0-2", None, 2, "3 GPUs for 2 models"),
        ("0", None, 2, "name a multiple of 2"),
        ("0-2", Some(2), 2, "2 models of 2 ranks (4); each rank"),
        ("0-2", Some(2), 2, "or name 4"),
        ("0,0", None, 2, "GPU 0 for two models"),
        ("0-2051", None, 2, "1026 GPUs for one model"),
    ] {
        let refused = gpus(list, ranks, models).unwrap_err();
        assert!(refused.contains(said), "{list}: {refused}");
    }
    let cores = |cpus, ranks| place(&request(Some(cpus), ranks), 2, &host(8));
    let dealt = cores("0-4", Some(2)).unwrap();
    let shown =
        |placement: &Placement| format!("{} {}", placement.devices[0], placement.devices[1]);
    let shown: Vec<_> = dealt.models.iter().map(shown).collect();
    assert_eq!(shown, ["CPU cores 0-1 CPU core 2", "CPU core 3 CPU core 4"]);
    let refused = cores("0-2", Some(2)).unwrap_err().to_string();
    assert!(
        refused.contains("3 cores for 2 models of 2 ranks (4)"),
        "{refused}"
    );
    // Unless asked for, two models do not crowd two cores with four ranks.
    let dealt = place(&request(None, None), 2, &host(2)).unwrap();
    assert!(dealt.models.iter().all(|it| it.world_size() == 1) && dealt.warnings.is_empty());
    let crowded = place(&request(None, Some(2)), 2, &host(2)).unwrap();
    assert!(crowded.warnings[0].contains("2 models of 2 ranks (4) share 2 cores"));
}

#[test]
fn every_rank_has_a_thread_and_none_is_lost() {
    let mut random = Random::new(seed(11));
    for _ in 0..2000 {
        let number = |random: &mut Random| u32::try_from(1 + random.below(20)).unwrap();
        let (count, ranks) = (number(&mut random), number(&mut random));
        let cpus = CpuSpec::Count(count);
        let request = DeviceRequest {
            gpus: None,
            cpus: Some(cpus),
            tensor_parallel_size: Some(ranks),
        };
        let models = *random.pick(&[1, 2, 3]);
        let placed = place(&request, models, &host(*random.pick(&[1, 2, 64]))).unwrap();
        assert_eq!(placed.models.len(), models as usize);
        assert!(placed.models.iter().all(|it| it.world_size() == ranks));
        let threads: Vec<u32> = placed.models.iter().flat_map(threads).collect();
        assert!(threads.iter().all(|threads| *threads >= 1));
        assert_eq!(threads.iter().sum::<u32>(), count.max(models * ranks));
    }
}
