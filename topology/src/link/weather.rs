//! The link in bad weather: datagrams are lost, late and out of order, and nobody is taken for dead. Where none
//! comes through any more, be it in one direction, that is noticed in time.

use super::tests::{LIMIT, Setup, hello, plan, setup};
use super::*;
use crate::ids::{Epoch, Step};
use crate::random::{Random, seed};
use crate::wire::{FromShard, PlanRow, StepPlan, ToShard};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep};

/// Of a hundred datagrams, so many are lost.
const LOST_OF_100: usize = 5;
/// The others are late by this, and by up to half as much again, each by itself: they overtake each other.
const LATE: Duration = Duration::from_millis(50);
/// How long the weather lasts: many times the silence after which a peer is gone.
const LASTS: Duration = Duration::from_secs(10);

/// What the project promises from a cut to its being known.
const NOTICE_LIMIT: Duration = Duration::from_millis(2500);

/// Of a hundred datagrams to the coordinator, and of a hundred from it, so many are lost.
type Losses = Arc<[AtomicUsize; 2]>;

/// Carries datagrams between `to` and whoever sends to the address it returns.
async fn weather(to: SocketAddr, losses: Losses) -> SocketAddr {
    let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
    let (near, far) = (bind().await.unwrap(), bind().await.unwrap());
    let address = near.local_addr().unwrap();
    let (near, far) = (Arc::new(near), Arc::new(far));
    let mut random = Random::new(seed(11));
    tokio::spawn(async move {
        let (mut ours, mut theirs) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        let mut client = None;
        loop {
            let (bytes, socket, target, direction) = tokio::select! {
                Ok((length, from)) = near.recv_from(&mut ours) => {
                    client = Some(from);
                    (ours[..length].to_vec(), far.clone(), Some(to), 0)
                }
                Ok((length, _)) = far.recv_from(&mut theirs) => {
                    (theirs[..length].to_vec(), near.clone(), client, 1)
                }
            };
            let late = LATE + LATE / 2 * u32::try_from(random.below(1000)).unwrap() / 1000;
            let is_lost = random.below(100) < losses[direction].load(Ordering::Relaxed);
            if let (Some(target), false) = (target, is_lost) {
                tokio::spawn(async move {
                    sleep(late).await;
                    let _ = socket.send_to(&bytes, target).await;
                });
            }
        }
    });
    address
}

fn step(number: u64) -> ToShard {
    let row = PlanRow {
        tokens: vec![7; 40 * usize::try_from(number % 50).unwrap() + 1],
        ..PlanRow::default()
    };
    ToShard::Run(Box::new(StepPlan {
        epoch: Epoch(1),
        step: Step(number),
        rows: vec![row],
    }))
}

/// Both ends of a link that all datagrams of which go through the weather.
async fn link(losses: &Losses) -> (Setup, Connected, Admitted) {
    let mut setup = setup(1);
    let address = weather(setup.address, losses.clone()).await;
    let certificate = setup.listener.certificate().clone();
    let connecting = connect(address, &certificate, &setup.identities[0], hello(0), LIMIT);
    let admitting = async {
        let mut admitted = setup.listener.accept(LIMIT).await.unwrap();
        let welcome = ToShard::Welcome {
            world_size: 4,
            generation: 0,
            pid: 1,
        };
        admitted.sender.send(&welcome).await.unwrap();
        admitted
    };
    let (shard, coordinator) = tokio::join!(connecting, admitting);
    (setup, shard.unwrap(), coordinator)
}

#[tokio::test]
async fn lost_late_and_overtaking_datagrams_end_no_link() {
    let losses: Losses = Arc::new([LOST_OF_100; 2].map(AtomicUsize::new));
    let (_setup, mut shard, mut coordinator) = link(&losses).await;
    let begun = Instant::now();
    let mut steps = 0;
    while begun.elapsed() < LASTS {
        let sent = [step(steps), step(steps + 1)];
        for plan in &sent {
            coordinator.sender.send(plan).await.unwrap();
        }
        for plan in &sent {
            assert_eq!(shard.receiver.recv_within(LIMIT).await.as_ref(), Ok(plan));
            let answer = FromShard::Allocated { kv_bytes: steps };
            shard.sender.send(&answer).await.unwrap();
            assert_eq!(coordinator.receiver.recv_within(LIMIT).await, Ok(answer));
            steps += 1;
        }
        // Longer than a step: only signs of life go by.
        if steps % 16 == 0 {
            sleep(2 * LATE).await;
        }
    }
    assert!(steps > 20, "only {steps} steps in {LASTS:?}");
    println!("{steps} steps");
    // A plan of many datagrams comes through as well.
    let long = plan(20_000);
    let sending = coordinator.sender.send(&long);
    let (sent, received) = tokio::join!(sending, shard.receiver.recv_within(LIMIT));
    assert_eq!((sent, received.as_ref()), (Ok(()), Ok(&long)));
}

#[tokio::test]
async fn a_cut_in_either_direction_is_noticed_in_time() {
    // To the coordinator, from it, both; while nothing is said but signs of life, and in the middle of a step.
    let cuts = [[100, 0], [0, 100], [100, 100]];
    let watching = cuts
        .into_iter()
        .flat_map(|cut| [false, true].map(|busy| (cut, busy)));
    let watching = watching.map(|(cut, busy)| async move {
        let losses: Losses = Arc::default();
        let (_setup, shard, mut coordinator) = link(&losses).await;
        sleep(4 * KEEP_ALIVE).await;
        for (lost, now) in losses.iter().zip(cut) {
            lost.store(now, Ordering::Relaxed);
        }
        let begun = Instant::now();
        if busy {
            coordinator.sender.send(&step(1)).await.unwrap();
        }
        let heard = coordinator.receiver.recv_within(LIMIT).await;
        assert_eq!(heard, Err(LinkError::TimedOut(IDLE_LIMIT)), "{cut:?}");
        drop(shard);
        begun.elapsed()
    });
    let noticed = join_all(watching).await;
    println!("noticed after {noticed:.1?}");
    assert!(noticed.iter().all(|it| *it <= NOTICE_LIMIT), "{noticed:?}");
}
