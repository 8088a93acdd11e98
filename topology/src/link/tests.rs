//! The link over real sockets of the loopback interface: what is admitted, what is refused, what
//! arrives. Deadlines are generous; only a failing test waits for them.

use super::connect::greet;
use super::*;
use crate::ids::{Epoch, Step};
use crate::random::{Random, seed};
use crate::wire::{
    FromShard, Hello, MAX_FRAME_BYTES, PlanRow, Preamble, StepPlan, ToShard, WIRE_VERSION,
};
use std::net::{Ipv4Addr, SocketAddr};

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub(super) const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn hello(rank: u32) -> Hello {
    Hello {
        rank: Rank(rank),
        pid: 7,
        device: "CPU core 0".to_owned(),
        free_bytes: 1,
        total_bytes: 2,
    }
}

pub(super) fn plan(tokens: usize) -> ToShard {
    let tokens = (0..).take(tokens).collect();
    let row = PlanRow {
        tokens,
        ..PlanRow::default()
    };
    ToShard::Run(Box::new(StepPlan {
        epoch: Epoch(1),
        step: Step(2),
        rows: vec![row],
    }))
}

/// A listener that expects one process for each rank.
pub(super) struct Setup {
    pub(super) listener: Listener,
    pub(super) address: SocketAddr,
    pub(super) identities: Vec<Identity>,
}

pub(super) fn setup(ranks: u32) -> Setup {
    setup_with(ranks, IDLE_LIMIT)
}

fn setup_with(ranks: u32, idle: Duration) -> Setup {
    let listener = Listener::bind_with(LOOPBACK, idle).unwrap();
    let address = listener.local_addr().unwrap();
    let identity = |rank| {
        let identity = Identity::generate().unwrap();
        listener.expect(Rank(rank), identity.certificate().clone());
        identity
    };
    let identities = (0..ranks).map(identity).collect();
    Setup {
        listener,
        address,
        identities,
    }
}

impl Setup {
    async fn connect(&self, rank: u32) -> Result<Connected, LinkError> {
        let identity = &self.identities[rank as usize];
        connect(
            self.address,
            self.listener.certificate(),
            identity,
            hello(rank),
            LIMIT,
        )
        .await
    }

    /// Both ends of an admitted link.
    pub(super) async fn link(&mut self, rank: u32) -> (Admitted, Connected) {
        let certificate = self.listener.certificate().clone();
        let identity = &self.identities[rank as usize];
        let connecting = connect(self.address, &certificate, identity, hello(rank), LIMIT);
        let admitting = async {
            let mut admitted = self.listener.accept(LIMIT).await.unwrap();
            admitted
                .sender
                .send(&ToShard::Welcome {
                    world_size: 4,
                    generation: 0,
                    pid: std::process::id(),
                })
                .await
                .unwrap();
            admitted
        };
        let (connected, admitted) = tokio::join!(connecting, admitting);
        (admitted, connected.unwrap())
    }
}

#[tokio::test]
async fn messages_arrive_in_order_both_ways() {
    let mut setup = setup(1);
    let (mut coordinator, mut shard) = setup.link(0).await;
    assert_eq!((coordinator.hello, shard.world_size), (hello(0), 4));
    let commands = [
        plan(1),
        ToShard::Allocate { num_blocks: 3 },
        plan(1_000_000),
        ToShard::Stop,
    ];
    let sending = async {
        for command in &commands {
            coordinator.sender.send(command).await.unwrap();
        }
    };
    let receiving = async {
        for command in &commands {
            assert_eq!(&shard.receiver.recv_within(LIMIT).await.unwrap(), command);
        }
    };
    tokio::join!(sending, receiving);
    let last = FromShard::Failed {
        reason: "the end".to_owned(),
    };
    shard.sender.send(&last).await.unwrap();
    // All of it has arrived before any of it is read: the end must not hide the message.
    shard.sender.finish(LIMIT).await.unwrap();
    assert_eq!(coordinator.receiver.recv_within(LIMIT).await, Ok(last));
    let over = coordinator.receiver.recv_within(LIMIT).await;
    assert!(matches!(over, Err(LinkError::Closed(_))), "{over:?}");
}

#[tokio::test]
async fn one_encoding_serves_all_ranks() {
    let mut setup = setup(3);
    let mut links = Vec::new();
    for rank in 0..3 {
        links.push(setup.link(rank).await);
    }
    let frame = Frame::new(&plan(1000)).unwrap();
    let senders = links
        .iter_mut()
        .map(|(coordinator, _)| &mut coordinator.sender);
    assert_eq!(broadcast(senders, &frame).await, vec![Ok(()); 3]);
    for (_, shard) in &mut links {
        assert_eq!(shard.receiver.recv_within(LIMIT).await.unwrap(), plan(1000));
    }
}

/// The peer does not read, the window fills, the send is given up: `Abort` goes through all the same,
/// and the plan is neither cut nor lost.
#[tokio::test]
async fn an_abort_never_waits_behind_a_plan() {
    let mut setup = setup(1);
    let (mut coordinator, mut shard) = setup.link(0).await;
    let large = plan(3_000_000);
    let mut sent = 0;
    let frame = Frame::new(&large).unwrap();
    while timeout(
        Duration::from_millis(300),
        coordinator.sender.send_frame(&frame),
    )
    .await
    .is_ok()
    {
        sent += 1;
        assert!(sent < 10, "the window never fills");
    }
    let abort = ToShard::Abort { epoch: Epoch(1) };
    coordinator.sender.send_urgent(&abort).await.unwrap();
    // Give it time to arrive: the test is about overtaking, not about speed.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(shard.receiver.recv_within(LIMIT).await.unwrap(), abort);
    let sending = async { coordinator.sender.send(&ToShard::Stop).await.unwrap() };
    let receiving = async {
        for _ in 0..=sent {
            assert_eq!(shard.receiver.recv_within(LIMIT).await.unwrap(), large);
        }
        assert_eq!(
            shard.receiver.recv_within(LIMIT).await.unwrap(),
            ToShard::Stop
        );
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn a_wait_that_is_given_up_loses_nothing() {
    let mut setup = setup(1);
    let (mut coordinator, mut shard) = setup.link(0).await;
    let large = plan(500_000);
    let sending = async {
        for _ in 0..5 {
            coordinator.sender.send(&large).await.unwrap();
        }
    };
    let receiving = async {
        let (mut received, mut given_up) = (0, 0);
        while received < 5 {
            match shard.receiver.recv_within(Duration::from_micros(200)).await {
                Ok(message) => {
                    assert_eq!(message, large);
                    received += 1;
                }
                Err(LinkError::TimedOut(_)) => given_up += 1,
                Err(other) => panic!("{other}"),
            }
        }
        given_up
    };
    let ((), given_up) = tokio::join!(sending, receiving);
    assert!(given_up > 0, "no wait was given up");
}

#[tokio::test]
async fn another_build_or_version_is_told_and_reported() {
    let mut setup = setup(1);
    let ours = Preamble::ours();
    let version = Preamble {
        version: WIRE_VERSION + 1,
        ..ours
    };
    let build = Preamble {
        build: [9; 16],
        ..ours
    };
    for (wrong, word) in [(version, "version"), (build, "build")] {
        let certificate = setup.listener.certificate().clone();
        let greeting = greet(
            setup.address,
            &certificate,
            &setup.identities[0],
            hello(0),
            wrong,
        );
        let refused = timeout(LIMIT, greeting).await.unwrap();
        let told = |reason: &str| reason.contains(word) && reason.contains("same binary");
        assert!(
            matches!(&refused, Err(LinkError::Refused(reason)) if told(reason)),
            "{refused:?}"
        );
        match setup.listener.accept(LIMIT).await {
            Err(LinkError::NotAdmitted {
                rank: Rank(0),
                reason,
                ..
            }) => assert!(told(&reason)),
            other => panic!("{other:?}"),
        }
    }
    // A failed attempt does not use the certificate up.
    setup.link(0).await;
}

/// Every field of the preamble and of `Hello`, each wrong by itself; what is refused is told with its name.
#[tokio::test]
async fn every_field_of_an_introduction_is_checked_and_named() {
    let mut setup = setup(2);
    let right = hello(0);
    // So that a field that is added is added here too.
    let Hello {
        rank: _,
        pid: _,
        device: _,
        free_bytes: _,
        total_bytes: _,
    } = right.clone();
    let ours = Preamble::ours();
    let Preamble {
        version: _,
        build: _,
    } = ours;
    let mut cases: Vec<(Preamble, Hello, &str)> = Vec::new();
    for rank in [1, 2, u32::MAX] {
        cases.push((ours, hello(rank), "`rank`"));
    }
    let with = |change: &dyn Fn(&mut Hello)| {
        let mut wrong = right.clone();
        change(&mut wrong);
        wrong
    };
    cases.push((ours, with(&|it| it.pid = 0), "`pid`"));
    for device in ["", "cpu\n", "\u{1b}[2Jgpu", &"x".repeat(257), "\u{85}"] {
        let wrong = with(&|it| device.clone_into(&mut it.device));
        cases.push((ours, wrong, "`device`"));
    }
    cases.push((ours, with(&|it| it.free_bytes = 3), "`free_bytes`"));
    cases.push((ours, with(&|it| it.total_bytes = 0), "`total_bytes`"));
    let mut random = Random::new(seed(17));
    for _ in 0..20 {
        let mut other = ours;
        other.build[random.below(16)] ^= 1 << random.below(8);
        cases.push((other, right.clone(), "build"));
        let mut other = ours;
        other.version ^= 1 << random.below(32);
        cases.push((other, right.clone(), "version"));
    }
    for (preamble, hello, named) in cases {
        let certificate = setup.listener.certificate().clone();
        let identity = &setup.identities[0];
        let greeting = greet(
            setup.address,
            &certificate,
            identity,
            hello.clone(),
            preamble,
        );
        let refused = timeout(LIMIT, greeting).await.unwrap();
        let told = |reason: &str| reason.contains(named);
        assert!(
            matches!(&refused, Err(LinkError::Refused(reason)) if told(reason)),
            "{named}: {hello:?}: {refused:?}"
        );
        match setup.listener.accept(LIMIT).await {
            Err(LinkError::NotAdmitted {
                rank: Rank(0),
                reason,
                ..
            }) => assert!(told(&reason), "{named}: {reason}"),
            other => panic!("{named}: {other:?}"),
        }
    }
    // None of them used the certificate up.
    setup.link(0).await;
}

#[tokio::test]
async fn a_certificate_is_for_one_rank_and_one_link() {
    let mut setup = setup(2);
    let certificate = setup.listener.certificate().clone();
    let refused = connect(
        setup.address,
        &certificate,
        &setup.identities[0],
        hello(1),
        LIMIT,
    )
    .await;
    assert!(
        matches!(&refused, Err(LinkError::Refused(why)) if why.contains("`rank` is 1")),
        "{refused:?}"
    );
    let reported = setup.listener.accept(LIMIT).await;
    assert!(
        matches!(reported, Err(LinkError::NotAdmitted { rank: Rank(0), .. })),
        "{reported:?}"
    );

    let (mut first, _shard) = setup.link(0).await;
    let again = setup.connect(0).await;
    assert!(matches!(again, Err(LinkError::Refused(_))), "{again:?}");
    // A replacement is another process with another key; the first link is not touched.
    setup.identities[0] = Identity::generate().unwrap();
    setup
        .listener
        .expect(Rank(0), setup.identities[0].certificate().clone());
    setup.link(0).await;
    first.sender.send(&ToShard::Stop).await.unwrap();
}

#[tokio::test]
async fn broken_frames_end_the_link() {
    let too_long = u32::try_from(MAX_FRAME_BYTES + 1)
        .unwrap()
        .to_le_bytes()
        .to_vec();
    let half = [100u32.to_le_bytes().as_slice(), b"only this"].concat();
    let nonsense = [3u32.to_le_bytes().as_slice(), b"\xFF\xFF\xFF"].concat();
    for (bytes, expected) in [
        (too_long, WireError::TooLong(MAX_FRAME_BYTES + 1)),
        (
            half,
            WireError::Malformed("the stream ended within a frame".to_owned()),
        ),
        (nonsense, WireError::Malformed(String::new())),
        (vec![0; 4], WireError::Malformed(String::new())),
    ] {
        let mut setup = setup(1);
        let (mut coordinator, mut shard) = setup.link(0).await;
        shard.sender.main.write_raw(&bytes).await;
        match (coordinator.receiver.recv_within(LIMIT).await, expected) {
            (Err(LinkError::Wire(WireError::Malformed(_))), WireError::Malformed(why))
                if why.is_empty() => {}
            (Err(LinkError::Wire(found)), expected) => assert_eq!(found, expected),
            (other, expected) => panic!("{other:?}, not {expected:?}"),
        }
    }
}

/// A killed process says nothing: its runtime is gone in the middle of things.
#[test]
fn a_silent_peer_is_noticed() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let (ours, theirs) = (runtime(), runtime());
    let idle = Duration::from_millis(1500);
    let mut setup = {
        let _inside = ours.enter();
        setup_with(1, idle)
    };
    let (certificate, address) = (setup.listener.certificate().clone(), setup.address);
    let identity = setup.identities.remove(0);
    let connecting = theirs
        .spawn(async move { connect(address, &certificate, &identity, hello(0), LIMIT).await });
    let mut admitted = ours.block_on(async {
        let mut admitted = setup.listener.accept(LIMIT).await.unwrap();
        admitted
            .sender
            .send(&ToShard::Welcome {
                world_size: 1,
                generation: 0,
                pid: std::process::id(),
            })
            .await
            .unwrap();
        admitted
    });
    let shard = ours.block_on(connecting).unwrap().unwrap();
    // Alive, though it says nothing: the signs of life keep the link.
    let quiet = ours.block_on(admitted.receiver.recv_within(2 * idle));
    assert!(matches!(quiet, Err(LinkError::TimedOut(_))), "{quiet:?}");
    assert!(ours.block_on(admitted.sender.send(&ToShard::Stop)).is_ok());
    theirs.shutdown_background();
    let gone = ours.block_on(admitted.receiver.recv_within(LIMIT));
    assert_eq!(gone, Err(LinkError::TimedOut(IDLE_LIMIT)));
    drop(shard);
}
