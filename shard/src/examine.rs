//! `cluster shard --examine`: answers questions about this node, a line for a line.
//!
//! What needs a device or a communicator is asked here, the rest is the topology's. Every answer comes
//! within a deadline, and the process ends when its standard input does. Invariant: standard output gets
//! answers and nothing else from here.

use crate::clock;
use crate::comm::tcp::TcpComm;
use crate::comm::{Abort, Comm, CommError, Seat};
use kernels::cpu::CpuBackend;
use std::io::{self, BufRead, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use topology::examine::host::{Devices, HostReport};
use topology::examine::model::ModelDigest;
use topology::examine::{Answer, Question, Speed};
use topology::wire::WIRE_VERSION;

/// How long the nodes of a group may take to find each other.
const JOIN_LIMIT: Duration = Duration::from_secs(8);
/// How long measuring may take after that.
const MEASURE_LIMIT: Duration = Duration::from_secs(10);
/// All-reduces of a few bytes, as many as one token of a model of 32 layers needs.
const SMALL_ROUNDS: usize = 64;
const SMALL_ELEMENTS: usize = 256;
/// All-reduces of a large tensor, and its elements: 4 MiB.
const LARGE_ROUNDS: usize = 4;
const LARGE_ELEMENTS: usize = 1 << 20;

/// How often it is said how far the reading of large files has come.
const SAY_EVERY: Duration = Duration::from_millis(500);

/// Datagrams sent to the coordinator, and how long each is waited for.
const DATAGRAMS: u32 = 5;
const DATAGRAM_LIMIT: Duration = Duration::from_millis(300);

/// Answers until nobody asks any more.
pub fn examine() -> ExitCode {
    for line in io::stdin().lock().lines() {
        let answered = line.and_then(|line| {
            let question = serde_json::from_str(&line)?;
            say(&answer(question))
        });
        if let Err(error) = answered {
            tracing::error!("cannot answer: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn say(answer: &Answer) -> io::Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// The files of a model. Whoever asked hears of it while large ones are read.
fn model(directory: &str, deep: bool) -> Answer {
    let said = Mutex::new(clock::now());
    let tell = |done, total| {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::now();
        if now.duration_since(*said) >= SAY_EVERY {
            *said = now;
            // Where nobody listens any more, the answer fails too.
            let _ = say(&Answer::Reading { done, total });
        }
    };
    Answer::Model(ModelDigest::read(directory, deep, &tell))
}

fn answer(question: Question) -> Answer {
    match question {
        Question::Clock => Answer::Clock(clock::unix_micros()),
        Question::Host { address } => Answer::Host(Box::new(HostReport::read(devices(), address))),
        Question::Model { directory, deep } => model(&directory, deep),
        Question::Reach { coordinator, nonce } => {
            Answer::Reach(reach(coordinator, nonce).map_err(|error| error.to_string()))
        }
        Question::MakeGroup {
            world_size,
            interface,
        } => {
            let id =
                <TcpComm as Comm<CpuBackend>>::new_id(world_size, LARGE_ELEMENTS, Some(interface));
            Answer::Group(id.map_err(|error| error.to_string()))
        }
        Question::AllReduce {
            id,
            rank,
            world_size,
            interface,
        } => {
            let speed = all_reduce(&id, (rank, world_size), interface);
            Answer::AllReduce(speed.map_err(|error| error.to_string()))
        }
    }
}

fn devices() -> Devices {
    #[cfg(feature = "cuda")]
    let nccl = crate::comm::nccl::library::load().map(crate::comm::nccl::library::dotted);
    #[cfg(not(feature = "cuda"))]
    let nccl = Err(crate::CPU_ONLY.to_owned());
    Devices {
        version: format!("{} (wire {WIRE_VERSION})", env!("CARGO_PKG_VERSION")),
        gpus: crate::probe::host(),
        nccl,
    }
}

/// Seconds that the fastest datagram takes there and back.
fn reach(coordinator: SocketAddr, nonce: u64) -> io::Result<f64> {
    let unspecified: IpAddr = match coordinator {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let socket = UdpSocket::bind((unspecified, 0))?;
    socket.connect(coordinator)?;
    socket.set_read_timeout(Some(DATAGRAM_LIMIT))?;
    let mut best: Option<f64> = None;
    let mut why = None;
    for number in 0..DATAGRAMS {
        let mut datagram = nonce.to_le_bytes().to_vec();
        datagram.extend(number.to_le_bytes());
        let begun = clock::now();
        let mut got = [0; 16];
        match socket.send(&datagram).and_then(|_| socket.recv(&mut got)) {
            // One that comes late answers an earlier number.
            Ok(length) if got[..length] == datagram => {
                let took = clock::now().duration_since(begun).as_secs_f64();
                best = Some(best.map_or(took, |best| best.min(took)));
            }
            Ok(_) => {}
            Err(error) => why = Some(error),
        }
    }
    let nothing = || why.unwrap_or_else(|| io::Error::other("no datagram came back"));
    best.ok_or_else(nothing)
}

fn all_reduce(
    id: &[u8],
    (rank, world_size): (u32, u32),
    interface: IpAddr,
) -> Result<Speed, CommError> {
    let abort = Abort::default();
    let (done, waiting) = channel::<()>();
    let watch = abort.clone();
    let watchdog = thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(move || abort_when_late(&watch, &waiting));
    watchdog.map_err(|error| CommError::Failed(error.to_string()))?;
    let seat = Seat {
        id,
        rank,
        world_size,
        interface: Some(interface),
        limit: JOIN_LIMIT,
        abort: &abort,
    };
    let backend = CpuBackend::new(1, None).map_err(|e| CommError::Failed(e.to_string()))?;
    let mut comm = TcpComm::join(&backend, &seat)?;
    let speed = measure(&mut comm, world_size);
    drop(done);
    speed.map_err(|error| match error {
        CommError::Aborted => CommError::Failed(format!(
            "it was not done within {} s: the network is very slow, or a node is gone",
            (JOIN_LIMIT + MEASURE_LIMIT).as_secs()
        )),
        other => other,
    })
}

/// A collective does not notice that another node is gone.
fn abort_when_late(abort: &Abort, done: &Receiver<()>) {
    if done.recv_timeout(JOIN_LIMIT + MEASURE_LIMIT) == Err(RecvTimeoutError::Timeout) {
        abort.abort();
    }
}

fn measure(comm: &mut TcpComm, world_size: u32) -> Result<Speed, CommError> {
    let mut small = vec![1.0; SMALL_ELEMENTS];
    let mut latencies = timed(SMALL_ROUNDS, || comm.all_reduce(&mut small))?;
    latencies.sort_by(f64::total_cmp);
    let mut large = vec![1.0; LARGE_ELEMENTS];
    let best = timed(LARGE_ROUNDS, || comm.all_reduce(&mut large))?;
    let best = best.into_iter().fold(f64::INFINITY, f64::min);
    // Every round multiplies ones by the number of nodes, which is exact up to 64 of them.
    let nodes = f32::from(u8::try_from(world_size).unwrap_or(u8::MAX));
    let expected: f32 = (0..LARGE_ROUNDS).map(|_| nodes).product();
    if large.iter().any(|x| x.to_bits() != expected.to_bits()) {
        let why = "the sum over the nodes is wrong: something on the way changes data";
        return Err(CommError::Failed(why.to_owned()));
    }
    Ok(Speed {
        latency_seconds: latencies[latencies.len() / 2],
        bytes_per_second: (LARGE_ELEMENTS * size_of::<f32>()) as f64 / best.max(1e-9),
    })
}

/// Seconds of each round.
fn timed(
    rounds: usize,
    mut round: impl FnMut() -> Result<(), CommError>,
) -> Result<Vec<f64>, CommError> {
    (0..rounds)
        .map(|_| {
            let begun = clock::now();
            round()?;
            Ok(clock::now().duration_since(begun).as_secs_f64())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn two_nodes_measure_their_all_reduce() {
        let interface = Ipv4Addr::LOCALHOST.into();
        let made = answer(Question::MakeGroup {
            world_size: 2,
            interface,
        });
        let Answer::Group(Ok(id)) = made else {
            panic!("{made:?}");
        };
        let nodes = [0, 1].map(|rank| {
            let id = id.clone();
            let question = Question::AllReduce {
                id,
                rank,
                world_size: 2,
                interface,
            };
            thread::spawn(move || answer(question))
        });
        for node in nodes {
            let answered = node.join().unwrap();
            let Answer::AllReduce(Ok(speed)) = answered else {
                panic!("{answered:?}");
            };
            assert!(
                speed.latency_seconds > 0.0 && speed.bytes_per_second > 1e6,
                "{speed:?}"
            );
        }
    }

    #[test]
    fn datagrams_come_back_or_it_is_said() {
        let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let coordinator = echo.local_addr().unwrap();
        let server = thread::spawn(move || {
            let mut datagram = [0; 16];
            for _ in 0..DATAGRAMS {
                let (length, from) = echo.recv_from(&mut datagram).unwrap();
                echo.send_to(&datagram[..length], from).unwrap();
            }
        });
        assert!(reach(coordinator, 7).unwrap() > 0.0);
        server.join().unwrap();
        assert!(reach(coordinator, 7).is_err(), "nobody listens any more");
    }
}
