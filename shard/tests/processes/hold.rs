//! Shards that lost their coordinator: whom they serve next, and when they end.
//!
//! A coordinator here is a runtime of its own, so that it can be gone from one moment to the next, without a word.

use crate::group::{Group, PATIENCE, Shard};
use crate::life::runtime;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use topology::ids::{Epoch, Rank};
use topology::launch::Hold;
use topology::launch::local::Process;
use topology::launch::process::ProcessId;
use topology::link::{Admitted, Certificate, Identity, Listener, SavedIdentity};
use topology::wire::{FromShard, ToShard};

const FIXTURE: &str = "llama3";
const PROMPT: [u32; 5] = [9, 40, 77, 130, 12];

fn hold(dir: &Path, seconds: u32) -> Hold {
    let legacy = dir.join("legacy.json");
    fs::write(&legacy, "{}").expect("it can be written");
    Hold {
        seconds,
        legacy: Some(legacy),
        log: dir.join("rank.log"),
    }
}

/// What is left of a group whose coordinator is gone.
struct Orphans {
    address: SocketAddr,
    identity: SavedIdentity,
    certificates: Vec<(Rank, Certificate)>,
    /// They end with these values, at the latest.
    processes: Vec<Process>,
}

impl Orphans {
    fn of(coordinator: Runtime, group: Group, hold: &Hold) -> Self {
        let address = group.listener.local_addr().expect("it listens");
        let identity = group.listener.identity().save();
        // Whatever is dropped after this says nothing any more.
        coordinator.shutdown_timeout(PATIENCE);
        let (mut certificates, mut processes) = (Vec::new(), Vec::new());
        for (rank, shard) in (0..).map(Rank).zip(group.ranks) {
            certificates.push((rank, shard.certificate));
            processes.push(shard.process);
        }
        drop(group.listener);
        for process in &mut processes {
            process.hang_up();
        }
        let sign = hold.notice().unwrap_or_else(|| hold.log.clone());
        until("they wait", || sign.exists());
        Self {
            address,
            identity,
            certificates,
            processes,
        }
    }

    /// A coordinator at the same address.
    fn listen(&self, identity: Identity, shards: &[(Rank, Certificate)]) -> Listener {
        let listener = Listener::bind_again(self.address, identity);
        let mut listener = listener.expect("nobody has the port");
        for (rank, certificate) in shards {
            listener.expect(*rank, certificate.clone());
        }
        listener.answer();
        listener
    }

    fn own(&self) -> Identity {
        self.identity.load().expect("it was saved")
    }

    fn all_end(&self) {
        for process in &self.processes {
            has_ended(process);
        }
    }
}

fn has_ended(process: &Process) {
    let pid = process.pid().expect("it was not waited for");
    until("it ends", || ProcessId::of(pid).is_none());
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

async fn welcome(listener: &mut Listener, generation: u32) -> Admitted {
    let came = listener.accept(PATIENCE).await.expect("it comes");
    say_welcome(came, generation).await
}

async fn say_welcome(mut came: Admitted, generation: u32) -> Admitted {
    let welcome = ToShard::Welcome {
        world_size: 2,
        generation,
        pid: std::process::id(),
    };
    came.sender.send(&welcome).await.expect("it listens");
    came
}

/// Takes over both shards, which say what they have.
async fn take_over(mut listener: Listener, orphans: Orphans, epoch: Epoch) -> Group {
    let mut came = [None, None];
    for _ in 0..2 {
        let mut admitted = welcome(&mut listener, 1).await;
        let FromShard::Held(held) = admitted.receiver.recv().await.expect("it speaks") else {
            panic!("it does not say what it has");
        };
        assert_eq!((held.num_blocks, held.epoch), (32, epoch));
        assert_eq!(held.load, crate::group::load(FIXTURE));
        let rank = admitted.hello.rank.index();
        came[rank] = Some(admitted);
    }
    let links = came.into_iter().flatten();
    let processes = orphans.processes.into_iter().zip(orphans.certificates);
    let ranks = links
        .zip(processes)
        .map(|(link, (process, (_, certificate)))| {
            assert_eq!(Some(link.hello.pid), process.pid());
            Shard {
                process,
                sender: link.sender,
                receiver: link.receiver,
                certificate,
            }
        });
    let ranks: Vec<_> = ranks.collect();
    Group::of(listener, ranks.try_into().ok().expect("two"), epoch)
}

pub(crate) fn another_coordinator_is_served_and_none_of_the_past() {
    let dir = tempfile::tempdir().expect("a directory");
    let hold = hold(dir.path(), 60);
    let first = runtime();
    let (group, undisturbed) = first.block_on(async {
        let mut group = Group::start_with(FIXTURE, Some(&hold)).await;
        group.form().await;
        let undisturbed = group.generate(&mut PROMPT.to_vec(), 6).await;
        // One of them is in a collective when both are lost.
        let plan = group.plan(&PROMPT, 0);
        group.ranks[0].say(ToShard::Run(Box::new(plan))).await;
        (group, undisturbed)
    });
    let epoch = group.epoch;
    let orphans = Orphans::of(first, group, &hold);
    runtime().block_on(async {
        let mut listener = orphans.listen(orphans.own(), &orphans.certificates);
        // One that was frozen comes back: it has the key, and its time is over. The shard that turns it away comes again
        // at once, and is then expected.
        let stale = listener.accept(PATIENCE).await.expect("it comes");
        let rank = stale.hello.rank;
        listener.expect(rank, orphans.certificates[rank.index()].1.clone());
        let mut stale = say_welcome(stale, 0).await;
        assert!(stale.receiver.recv().await.is_err(), "it is turned away");

        let mut group = take_over(listener, orphans, epoch).await;
        group.form().await;
        let again = group.generate(&mut PROMPT.to_vec(), 6).await;
        assert_eq!(group.epoch, Epoch(epoch.0 + 1));
        assert_eq!(again, undisturbed);
        assert!(hold.notice().is_some_and(|notice| !notice.exists()));
        let said = fs::read_to_string(&hold.log).expect("nobody reads its pipe");
        assert!(said.contains("held for another coordinator"), "{said}");
        // A link that is closed is an order, not a loss.
        for rank in &group.ranks {
            rank.sender.close("enough");
            has_ended(&rank.process);
        }
    });
}

pub(crate) fn nobody_else_is_served_and_waiting_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    let lose = |hold: &Hold| {
        let coordinator = runtime();
        let group = coordinator.block_on(Group::start_with(FIXTURE, Some(hold)));
        Orphans::of(coordinator, group, hold)
    };
    let second = runtime();

    // A stranger at the old address is not believed, and does not end them before their time either.
    let begun = Instant::now();
    let orphans = lose(&hold(dir.path(), 3));
    second.block_on(async {
        let stranger = Identity::generate().expect("randomness");
        let mut listener = orphans.listen(stranger, &orphans.certificates);
        let came = listener.accept(Duration::from_millis(1500)).await;
        assert!(came.is_err());
    });
    orphans.all_end();
    assert!(begun.elapsed() > Duration::from_secs(2));

    // The right coordinator that expects others.
    let hold = hold(dir.path(), 60);
    let orphans = lose(&hold);
    second.block_on(async {
        let listener = orphans.listen(orphans.own(), &[]);
        // The listener's tasks work while this one waits.
        let ended = tokio::task::spawn_blocking(move || orphans.all_end());
        ended.await.expect("they end");
        drop(listener);
    });

    // One that leaves nothing.
    let orphans = lose(&hold);
    fs::remove_file(hold.legacy.as_ref().expect("on this host")).expect("it is there");
    orphans.all_end();

    // On another host they cannot look for it, and what they print is nobody's when nobody came.
    let elsewhere = tempfile::tempdir().expect("a directory");
    let hold = Hold {
        seconds: 2,
        legacy: None,
        log: elsewhere.path().join("rank.log"),
    };
    lose(&hold).all_end();
    let left = fs::read_dir(elsewhere.path()).expect("it is there");
    assert_eq!(left.count(), 0);
}
