//! `--topology FILE`: from nodes in a file to devices, memory and places to start ranks.
//!
//! Reads the file and asks nodes for their memory and GPUs; starts no shard. What is wrong in the file
//! or with the way to a node is one sentence. Invariant: ranks, sites and shares of memory are in the
//! same order, that of the models' devices.

use super::args::Up;
use super::layers;
use crate::fleet::RankSite;
use anyhow::{Context, Result, bail, ensure};
use futures_util::future::try_join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use topology::examine::{Answer, Question};
use topology::gpus::GpuHost;
use topology::host::HostMemory;
use topology::launch::errand::Errand;
use topology::launch::ssh::{self, Image, Remote};
use topology::placement::{Device, Placement, Placements};
use topology::spec::cluster::{ModelSpec, Node, Topology, TopologyError};

/// Longest time for a node to say what GPUs it has; a driver takes seconds to wake up.
const GPU_LIMIT: Duration = Duration::from_secs(30);

/// Reads the topology file, if one was given.
///
/// # Errors
/// A sentence with file, line and key, or naming the flag that contradicts it.
pub fn read(up: &Up) -> Result<Option<Topology>> {
    let Some(file) = &up.topology else {
        return Ok(None);
    };
    for (flag, given) in [
        ("--gpus", up.gpus.is_some()),
        ("--cpus", up.cpus.is_some()),
        ("--tensor-parallel-size", up.tensor_parallel_size.is_some()),
    ] {
        ensure!(
            !given,
            "{flag} and --topology contradict each other; the file says what each node gives, so leave \
             out {flag}"
        );
    }
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read --topology {}", file.display()))?;
    Ok(Some(Topology::parse(file, &text)?))
}

/// The flags for each model of the file: what its table says goes before the command line, which is for all.
///
/// # Errors
/// A sentence with file, line and key, or saying which of file and command line is to name the model.
pub fn of_models(up: &Up, topology: &Topology) -> Result<Vec<Up>> {
    let (file, given) = (up.topology.clone().unwrap_or_default(), up.models());
    match (topology.models.as_slice(), given.len()) {
        ([only], 1) => ensure!(
            only.path.is_none(),
            "{} names a model (`path`), and --model does too; keep one of them",
            file.display()
        ),
        (_, 0) => {}
        ([_], count) => bail!(
            "there are {count} --model, and {} does not say which devices each takes; give it a [[model]] with \
             `path` and `devices` for each",
            file.display()
        ),
        (models, _) => bail!(
            "{} says what its {} models are; leave out --model",
            file.display(),
            models.len()
        ),
    }
    ensure!(
        topology.models.len() == 1 || up.served_model_name.is_empty(),
        "--served-model-name is for one model, and {} has {}; give each [[model]] a `name`",
        file.display(),
        topology.models.len()
    );
    let own = |model: &ModelSpec| {
        let own = layers::with_settings(up, &model.settings);
        let mut own = own.map_err(|(setting, reason)| TopologyError {
            file: file.clone(),
            line: setting.line,
            reason: format!("`{}`: {reason}", setting.key),
        })?;
        own.model = match &model.path {
            Some(path) => vec![path.clone()],
            None => given.iter().map(|model| (*model).to_owned()).collect(),
        };
        own.model_positional = None;
        // Who types a directory means that one's name, or says another.
        if own.served_model_name.is_empty() && given.is_empty() {
            own.served_model_name.clone_from(&model.names);
        }
        Ok(own)
    };
    topology.models.iter().map(own).collect()
}

/// A device for each rank of each model.
pub fn placements(topology: &Topology) -> Placements {
    let placement = |model: &ModelSpec| Placement {
        devices: model
            .ranks
            .iter()
            .map(|(_, device)| device.clone())
            .collect(),
    };
    Placements {
        models: topology.models.iter().map(placement).collect(),
        warnings: Vec::new(),
    }
}

/// What `plan` says of where a rank of a model is.
pub fn describe(topology: &Topology, model: usize, rank: usize) -> Option<String> {
    let (node, _) = topology.models.get(model)?.ranks.get(rank)?;
    let node = &topology.nodes[*node];
    let interface = node.interface.as_deref();
    let interface = interface.map_or_else(String::new, |name| format!(", NCCL over {name}"));
    Some(match &node.ssh {
        Some(target) => format!("node {} (ssh {target}{interface})", node.name),
        None => format!("node {} (this machine{interface})", node.name),
    })
}

/// Where the ranks of a model are and by what they are reached, in order; empty where no file names nodes. Where that
/// has changed, shards cannot go on.
pub fn places(topology: Option<&Topology>, model: usize) -> Vec<String> {
    let Some(topology) = topology else {
        return Vec::new();
    };
    let place = |(rank, (node, _)): (usize, &(usize, Device))| {
        let place = describe(topology, model, rank)?;
        let (node, coordinator) = (&topology.nodes[*node], topology.coordinator);
        let (address, work_dir) = (node.address, &node.work_dir);
        let port = node.ssh.as_ref().and_then(|target| target.port);
        let port = port.map_or_else(String::new, |port| format!(" port {port}"));
        Some(format!(
            "{place}{port} at {address} in {work_dir}, coordinator at {coordinator}"
        ))
    };
    let ranks = topology.models[model].ranks.iter().enumerate();
    ranks.filter_map(place).collect()
}

/// The nodes on which models compute on such devices.
fn nodes_with(topology: &Topology, wanted: impl Fn(&Device) -> bool) -> BTreeSet<usize> {
    let ranks = topology.models.iter().flat_map(|model| &model.ranks);
    let ranks = ranks.filter(|(_, device)| wanted(device));
    ranks.map(|(node, _)| *node).collect()
}

/// Asks all of `nodes` at the same time; what each answered, by its number.
fn ask_all<T>(
    topology: &Topology,
    nodes: &BTreeSet<usize>,
    ask: &impl AsyncFn(&Node) -> Result<T>,
) -> Result<BTreeMap<usize, T>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("cannot start a thread")?;
    let asked = nodes.iter().map(async |index| {
        let node = &topology.nodes[*index];
        let answer = ask(node).await;
        let answer = answer.with_context(|| format!("node {}", node.name))?;
        Ok((*index, answer))
    });
    let answers = runtime.block_on(try_join_all(asked));
    answers.map(|answers| answers.into_iter().collect())
}

/// Asks every node on whose cores ranks compute how much memory is free, in bytes.
///
/// # Errors
/// A sentence that names the node and says what to change.
pub fn free_memory(topology: &Topology) -> Result<BTreeMap<usize, u64>> {
    let nodes = nodes_with(topology, |device| matches!(device, Device::Cpu { .. }));
    ask_all(topology, &nodes, &async |node: &Node| {
        let memory = match &node.ssh {
            None => HostMemory::read().context("ask for free memory")?,
            Some(target) => {
                let said = ssh::meminfo(target).await?;
                HostMemory::from_meminfo(&said).context("it is no Linux machine")?
            }
        };
        Ok(memory.free_bytes)
    })
}

/// Asks every node on whose GPUs ranks compute what these are. The program that would run there answers, and
/// is put there first.
///
/// # Errors
/// A sentence that names the node and says what is missing there.
pub fn gpus(topology: &Topology) -> Result<BTreeMap<usize, GpuHost>> {
    let nodes = nodes_with(topology, |device| matches!(device, Device::Gpu { .. }));
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let is_remote = |node: &usize| topology.nodes[*node].ssh.is_some();
    let image = nodes.iter().any(is_remote).then(|| Image::read(&program));
    let image = image.transpose()?;
    ask_all(topology, &nodes, &async |node: &Node| {
        let mut errand = match node.ssh.as_ref().zip(image.as_ref()) {
            None => Errand::start(program.as_ref(), ["shard", "--examine"])?,
            Some((target, image)) => {
                let work_dir = node.work_dir.clone();
                let remote = Remote::new(target.clone(), work_dir, image.clone());
                remote.install().await?;
                remote.examine()?
            }
        };
        let address = node.address;
        match errand.ask(&Question::Host { address }, GPU_LIMIT).await? {
            Answer::Host(host) => host
                .gpus
                .map_err(|why| anyhow::anyhow!("its `gpus` cannot be used: {why}")),
            other => bail!("it answers another question: {other:?}"),
        }
    })
}

/// Where the ranks of each model are started. Reads `program` once if any of them is on another node.
///
/// # Errors
/// If it cannot be read.
pub fn sites(topology: &Topology, program: &Path) -> Result<Vec<Vec<RankSite>>> {
    let mut nodes = nodes_with(topology, |_| true).into_iter();
    let image = nodes
        .any(|node| topology.nodes[node].ssh.is_some())
        .then(|| Image::read(program))
        .transpose()?;
    // One for each node, whatever models it serves: the program is put there once.
    let mut remotes: BTreeMap<usize, Arc<Remote>> = BTreeMap::new();
    let mut sites = Vec::new();
    for model in &topology.models {
        let is_one_host = model.is_one_host();
        let site = |(index, device): &(usize, Device)| {
            let node = &topology.nodes[*index];
            let remote = node.ssh.as_ref().zip(image.as_ref());
            let remote = remote.map(|(target, image)| {
                let (target, work_dir) = (target.clone(), node.work_dir.clone());
                let new = || Arc::new(Remote::new(target, work_dir, image.clone()));
                remotes.entry(*index).or_insert_with(new).clone()
            });
            RankSite {
                device: device.clone(),
                remote,
                interface: (!is_one_host).then_some(node.address),
                nccl_interface: node.interface.clone().filter(|_| !is_one_host),
            }
        };
        sites.push(model.ranks.iter().map(site).collect());
    }
    Ok(sites)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of `up --topology` with these, on a file of this text.
    fn own(text: &str, more: &[&str]) -> Result<Vec<Up>, String> {
        let argv = [&["cluster", "up", "--topology", "c.toml"], more].concat();
        let command = layers::parse(argv.into_iter().map(Into::into))
            .unwrap()
            .command;
        let crate::cli::args::Command::Up(up) = command else {
            panic!("it is up");
        };
        let topology = Topology::parse(Path::new("c.toml"), text).unwrap();
        of_models(&up, &topology).map_err(|error| error.to_string())
    }

    #[test]
    fn a_models_table_goes_before_the_flags_for_all_and_is_not_contradicted() {
        let head = "coordinator.address = \"10.0.0.1\"\n[[node]]\nname = \"a\"\naddress = \"10.0.0.1\"\n\
                    cpus = 2\nshards = 2\n";
        let two = format!(
            "{head}[[model]]\nname = [\"x\", \"y\"]\npath = \"/x\"\ndevices = [\"a:0\"]\nmax_model_len = 7\n\
             [[model]]\ndevices = [\"a:1\"]\n"
        );
        let ups = own(&two, &["--max-model-len", "9", "--dtype", "float16"]).unwrap();
        let lengths: Vec<_> = ups.iter().map(|up| up.max_model_len.to_string()).collect();
        assert_eq!(lengths, ["7", "9"]);
        assert!(ups.iter().all(|up| up.dtype.name() == "float16"));
        assert_eq!(
            (&*ups[0].model, &*ups[0].served_model_name),
            (
                &["/x".to_owned()][..],
                &["x".to_owned(), "y".to_owned()][..]
            )
        );
        assert!(ups[1].model.is_empty() && ups[1].served_model_name.is_empty());

        let whole = own(head, &["--model", "n=/m"]).unwrap();
        assert_eq!(whole[0].model, ["n=/m"]);
        let named = format!("{head}[[model]]\nname = \"x\"\ndevices = [\"a\"]\n");
        assert_eq!(own(&named, &[]).unwrap()[0].served_model_name, ["x"]);
        assert!(
            own(&named, &["/m"]).unwrap()[0]
                .served_model_name
                .is_empty()
        );
        let pathed = format!("{named}path = \"/x\"\n");
        let wrong = two.replace("max_model_len = 7", "dtype = \"int3\"");
        for (text, more, said) in [
            (&pathed, &["/m"][..], "keep one of them"),
            (
                &head.to_owned(),
                &["--model", "/a", "--model", "/b"],
                "give it a [[model]]",
            ),
            (&two, &["/m"], "what its 2 models are; leave out --model"),
            (
                &two,
                &["--served-model-name", "z"],
                "give each [[model]] a `name`",
            ),
            (&wrong, &[], "c.toml:11: `dtype`: invalid value 'int3'"),
        ] {
            let refused = own(text, more).unwrap_err();
            assert!(refused.contains(said), "{more:?}: {refused}");
        }
    }

    const TEXT: &str = include_str!("../../../scripts/cluster.toml");

    #[test]
    fn sites_are_in_rank_order_and_share_their_nodes() {
        let topology = Topology::parse(Path::new("cluster.toml"), TEXT).unwrap();
        let program = std::env::current_exe().unwrap();
        let sites = sites(&topology, &program).unwrap().remove(0);
        let [a, b, c, d] = sites.as_slice() else {
            panic!("{sites:?}");
        };
        assert!(a.remote.is_none() && b.remote.is_none());
        let (c, d) = (c.remote.as_ref().unwrap(), d.remote.as_ref().unwrap());
        assert!(Arc::ptr_eq(c, d), "the program is copied once");
        let addresses: Vec<_> = sites.iter().map(|site| site.interface.unwrap()).collect();
        assert_eq!(addresses[0].to_string(), "10.77.0.1");
        assert_eq!(addresses[3].to_string(), "10.77.0.2");
        // On one host nothing listens on a network.
        let one = TEXT.replace("[\"here\", \"there\"]", "[\"there\"]");
        let one = Topology::parse(Path::new("cluster.toml"), &one).unwrap();
        let sites = super::sites(&one, &program).unwrap().remove(0);
        assert!(
            sites
                .iter()
                .all(|site| site.interface.is_none() && site.remote.is_some())
        );
        assert!(
            describe(&topology, 0, 2)
                .unwrap()
                .contains("ssh cluster@10.77.0.2, NCCL over eth0")
        );
        assert_eq!(describe(&topology, 0, 4), None);
    }
}
