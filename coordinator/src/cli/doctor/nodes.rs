//! Asks the nodes: one process on each, here or behind `ssh`, all at the same time.
//!
//! What cannot be asked is a finding with the reason; what was answered is judged elsewhere. Invariant:
//! every question has a deadline, so that a node that is stuck is a finding too.

use super::{EVERYWHERE, Finding, Level};
use crate::cli::progress::{Meter, Notes};
use crate::clock::{now, since, unix_micros};
use anyhow::{Context, Result};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UdpSocket;
use topology::examine::host::HostReport;
use topology::examine::model::ModelDigest;
use topology::examine::{Answer, Question, Speed};
use topology::launch::LaunchError;
use topology::launch::errand::Errand;
use topology::launch::ssh::{Image, Remote, Target};
use topology::placement::Device;

/// Longest time for an answer that reads a few files.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How long a node may say nothing while it reads weights.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How often a node is asked for its clock; the fastest answer counts.
const CLOCK_ROUNDS: usize = 4;

/// Where the program runs, or is to run.
#[derive(Debug)]
pub(super) struct Place {
    /// The node's name.
    pub(super) name: String,
    /// Where others reach it; `None` where there are no others.
    pub(super) address: Option<IpAddr>,
    /// The interface it names for NCCL.
    pub(super) interface: Option<String>,
    /// How to get there; `None` is this machine.
    pub(super) ssh: Option<Target>,
    /// Where the program is put there.
    pub(super) work_dir: String,
    /// What its ranks compute on.
    pub(super) devices: Vec<Device>,
    /// Directories of the models of its ranks; none: the built-in one.
    pub(super) models: Vec<String>,
    /// Whether any of its ranks work with ranks of another node.
    pub(super) joins_nodes: bool,
}

impl Place {
    /// This machine alone.
    pub(super) fn here() -> Self {
        Self {
            name: "this machine".to_owned(),
            address: None,
            interface: None,
            ssh: None,
            work_dir: String::new(),
            devices: Vec::new(),
            models: Vec::new(),
            joins_nodes: false,
        }
    }
}

/// What is asked of all.
#[derive(Debug)]
pub(super) struct Asking {
    /// This machine's address for the nodes.
    pub(super) coordinator: Option<IpAddr>,
    /// Whether weights are read whole.
    pub(super) deep: bool,
    /// Where it is said how far that has come.
    pub(super) notes: Notes,
}

/// Models by their directories, or why they are none.
pub(super) type Digests = BTreeMap<String, Result<ModelDigest, String>>;

/// What a node answered.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) host: HostReport,
    /// How far its clock is ahead, and how exactly that is known, in seconds.
    pub(super) clock: (f64, f64),
    /// Of its ranks; none for the built-in model, which is the program itself.
    pub(super) models: Digests,
    /// Seconds there and back to the coordinator.
    pub(super) reach: Option<Result<f64, String>>,
}

/// An all-reduce over the nodes of one model.
#[derive(Debug)]
pub(super) struct Measured {
    /// What each node's rank measured, by the name of the node.
    pub(super) speeds: Vec<(String, Result<Speed, String>)>,
}

/// What all nodes answered.
#[derive(Debug)]
pub(super) struct Asked {
    /// About the way to them.
    pub(super) findings: Vec<Finding>,
    /// In the order of places; `None` for one that did not answer.
    pub(super) seen: Vec<Option<Seen>>,
    /// One for each group of nodes all of which answered.
    pub(super) measured: Vec<Measured>,
}

/// Asks all of `places`, and has each of `groups` of them, by number, form the sums that its ranks will form.
pub(super) async fn ask_all(
    places: &[Place],
    groups: &[Vec<usize>],
    asking: &Asking,
) -> Result<Asked> {
    let path = std::env::current_exe().context("cannot find this program's own file")?;
    let mut findings = Vec::new();
    let echo = match asking.coordinator.map(Echo::start) {
        None => None,
        Some(started) => match started.await {
            Ok(echo) => Some(echo),
            Err(text) => {
                findings.push(Finding::new(Level::Fail, EVERYWHERE, "coordinator", text));
                None
            }
        },
    };
    let image = places.iter().any(|place| place.ssh.is_some());
    let image = if image {
        let path = path.clone();
        let read = tokio::task::spawn_blocking(move || Image::read(&path)).await;
        Some(read.context("reading this program panicked")??)
    } else {
        None
    };
    let connected = places
        .iter()
        .map(|place| connect(place, &path, image.as_ref()));
    let mut errands: Vec<Option<Errand>> = Vec::new();
    for (place, (finding, errand)) in places.iter().zip(join_all(connected).await) {
        findings.push(Finding::new(finding.0, &place.name, "reach", finding.1));
        errands.push(errand);
    }
    let asked = places
        .iter()
        .zip(&mut errands)
        .map(async |(place, errand)| {
            let errand = errand.as_mut()?;
            Some(ask(errand, place, asking, echo.as_ref()).await)
        });
    let mut seen: Vec<Option<Seen>> = Vec::new();
    for (place, asked) in places.iter().zip(join_all(asked).await) {
        let answered = asked.and_then(|asked| {
            let failed = |error: LaunchError| {
                let text =
                    format!("it stopped answering: {error}; see that the program runs there");
                findings.push(Finding::new(Level::Fail, &place.name, "program", text));
            };
            asked.map_err(failed).ok()
        });
        seen.push(answered);
    }
    let mut measured = Vec::new();
    // One after the other: side by side they would measure each other.
    for group in groups {
        if group.iter().all(|place| seen[*place].is_some()) {
            let nodes = places.iter().zip(&mut errands).enumerate();
            let members = nodes.filter(|(place, _)| group.contains(place));
            let members = members.filter_map(|(_, (place, node))| Some((place, node.as_mut()?)));
            measured.push(measure(members.collect()).await);
        }
    }
    Ok(Asked {
        findings,
        seen,
        measured,
    })
}

/// A process on the node, and a line about the way to it.
async fn connect(
    place: &Place,
    path: &PathBuf,
    image: Option<&Image>,
) -> ((Level, String), Option<Errand>) {
    let begun = now();
    let connected = async {
        let Some((target, image)) = place.ssh.as_ref().zip(image) else {
            let errand = Errand::start(path.as_ref(), ["shard", "--examine"])?;
            return Ok::<_, LaunchError>((errand, "this machine".to_owned()));
        };
        let remote = Remote::new(target.clone(), place.work_dir.clone(), image.clone());
        let is_new = remote.install().await?;
        let program = if is_new { "was copied" } else { "is there" };
        let errand = remote.examine()?;
        Ok((
            errand,
            format!(
                "ssh {target}, host key known; the program {program} ({})",
                image.name()
            ),
        ))
    };
    match connected.await {
        Ok((errand, text)) => {
            let took = since(begun).as_secs_f64();
            ((Level::Ok, format!("{text}, {took:.2} s")), Some(errand))
        }
        Err(error) => ((Level::Fail, error.to_string()), None),
    }
}

async fn ask(
    errand: &mut Errand,
    place: &Place,
    asking: &Asking,
    echo: Option<&Echo>,
) -> Result<Seen, LaunchError> {
    let address = place.address.unwrap_or([127, 0, 0, 1].into());
    let host = match errand
        .ask(&Question::Host { address }, ANSWER_LIMIT)
        .await?
    {
        Answer::Host(host) => *host,
        other => return Err(unasked(&other)),
    };
    let clock = clock(errand).await?;
    let mut models = Digests::new();
    for directory in &place.models {
        let question = Question::Model {
            directory: directory.clone(),
            deep: asking.deep,
        };
        let meter = Meter::new(asking.notes, format!("{}: reading {directory}", place.name));
        let tell = |done, total| meter.tell(done, total);
        match errand
            .ask_and_watch(&question, SILENCE_LIMIT, &tell)
            .await?
        {
            Answer::Model(digest) => drop(models.insert(directory.clone(), digest)),
            other => return Err(unasked(&other)),
        }
    }
    let reach = match echo {
        None => None,
        Some(Echo { address, nonce, .. }) => {
            let question = Question::Reach {
                coordinator: *address,
                nonce: *nonce,
            };
            match errand.ask(&question, ANSWER_LIMIT).await? {
                Answer::Reach(reach) => Some(reach),
                other => return Err(unasked(&other)),
            }
        }
    };
    Ok(Seen {
        host,
        clock,
        models,
        reach,
    })
}

/// Seconds a node's clock is ahead of this one, and how wrong that may be.
async fn clock(errand: &mut Errand) -> Result<(f64, f64), LaunchError> {
    let mut best: Option<(f64, f64)> = None;
    for _ in 0..CLOCK_ROUNDS {
        let (before, begun) = (unix_micros(), now());
        let there = match errand.ask(&Question::Clock, ANSWER_LIMIT).await? {
            Answer::Clock(there) => there,
            other => return Err(unasked(&other)),
        };
        // It answered somewhere between.
        let half = since(begun).as_secs_f64() / 2.0;
        let ahead = (there as f64 - before as f64) / 1e6 - half;
        if best.is_none_or(|(_, known)| half < known) {
            best = Some((ahead, half));
        }
    }
    Ok(best.unwrap_or_default())
}

async fn measure(group: Vec<(&Place, &mut Errand)>) -> Measured {
    let names = group.iter().map(|(place, _)| place.name.clone());
    let names: Vec<String> = names.collect();
    let speeds = all_reduce(group).await;
    Measured {
        speeds: names.into_iter().zip(speeds).collect(),
    }
}

/// The same sum on all nodes of `group` at once; what each measured.
async fn all_reduce(mut group: Vec<(&Place, &mut Errand)>) -> Vec<Result<Speed, String>> {
    let interface = |place: &Place| place.address.unwrap_or([127, 0, 0, 1].into());
    let count = group.len();
    let everyone = |why: String| vec![Err(why); count];
    let world_size = u32::try_from(count).unwrap_or(u32::MAX);
    let Some((place, first)) = group.first_mut() else {
        return Vec::new();
    };
    let make = Question::MakeGroup {
        world_size,
        interface: interface(place),
    };
    let id = match first.ask(&make, ANSWER_LIMIT).await {
        Ok(Answer::Group(Ok(id))) => id,
        Ok(Answer::Group(Err(why))) => return everyone(why),
        Ok(other) => return everyone(unasked(&other).to_string()),
        Err(error) => return everyone(error.to_string()),
    };
    let asked = (0..).zip(group).map(async |(rank, (place, errand))| {
        let question = Question::AllReduce {
            id: id.clone(),
            rank,
            world_size,
            interface: interface(place),
        };
        match errand.ask(&question, ANSWER_LIMIT).await {
            Ok(Answer::AllReduce(speed)) => speed,
            Ok(other) => Err(unasked(&other).to_string()),
            Err(error) => Err(error.to_string()),
        }
    });
    join_all(asked).await
}

fn unasked(answer: &Answer) -> LaunchError {
    let text: String = format!("{answer:?}").chars().take(100).collect();
    LaunchError::Handshake(format!("it answers another question: {text}"))
}

/// Sends back the datagrams of the nodes, on the address where the control plane would listen.
#[derive(Debug)]
struct Echo {
    address: SocketAddr,
    nonce: u64,
    task: tokio::task::JoinHandle<()>,
}

impl Echo {
    async fn start(address: IpAddr) -> Result<Self, String> {
        let refused = |error: std::io::Error| {
            format!(
                "cannot listen on {address}: {error}; `address` of [coordinator] must be one of this machine's"
            )
        };
        let socket = UdpSocket::bind((address, 0)).await.map_err(refused)?;
        let address = socket.local_addr().map_err(refused)?;
        let (nonce, _) = uuid::Uuid::new_v4().as_u64_pair();
        let task = tokio::spawn(async move {
            let mut datagram = [0; 16];
            while let Ok((length, from)) = socket.recv_from(&mut datagram).await {
                // Nobody else's; and never more than came.
                if datagram[..length].starts_with(&nonce.to_le_bytes()) {
                    let _ = socket.send_to(&datagram[..length], from).await;
                }
            }
        });
        Ok(Self {
            address,
            nonce,
            task,
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Values by how many nodes have them, for saying who differs.
pub(super) fn groups<'a, T: Ord>(
    values: impl Iterator<Item = (&'a str, T)>,
) -> BTreeMap<T, Vec<&'a str>> {
    let mut groups: BTreeMap<T, Vec<&str>> = BTreeMap::new();
    for (name, value) in values {
        groups.entry(value).or_default().push(name);
    }
    groups
}
