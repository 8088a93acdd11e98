//! Sessions over a device whose channels the test holds.

use super::*;
use crate::device::{About, OpenComm};
use std::future::pending;
use tokio::task::JoinHandle;
use topology::ids::{Rank, Step};
use topology::link::{Admitted, Identity, Listener, connect};
use topology::wire::{Hello, StepPlan};

const PATIENCE: Duration = Duration::from_secs(30);

/// The channels that a device thread would hold.
struct FakeDevice {
    commands: mpsc::Receiver<Command>,
    answer: mpsc::Sender<FromShard>,
    left: watch::Sender<Option<Epoch>>,
}

impl FakeDevice {
    async fn next(&mut self) -> Command {
        let command = timeout(PATIENCE, self.commands.recv()).await;
        command.expect("in time").expect("the session lives")
    }
}

fn device() -> (Device, FakeDevice) {
    let (commands, inbox) = mpsc::channel(4);
    let (answer, answers) = mpsc::channel(4);
    let (left_sender, left) = watch::channel(None);
    let name = String::new();
    let device = Device {
        about: About {
            name,
            total_bytes: 0,
            free_bytes: 0,
        },
        commands,
        answers,
        answer: answer.clone(),
        left,
        open_comm: OpenComm::default(),
    };
    (
        device,
        FakeDevice {
            commands: inbox,
            answer,
            left: left_sender,
        },
    )
}

/// A session under way, and the coordinator's end of its link.
async fn start(device: Device) -> (JoinHandle<Result<End>>, Admitted) {
    let mut listener = Listener::bind(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
    let identity = Identity::generate().unwrap();
    listener.expect(Rank(0), identity.certificate().clone());
    let address = listener.local_addr().unwrap();
    let coordinator = listener.certificate().clone();
    let session = tokio::spawn(async move {
        let hello = Hello {
            rank: Rank(0),
            pid: 1,
            device: "none".to_owned(),
            free_bytes: 0,
            total_bytes: 0,
        };
        let link = connect(address, &coordinator, &identity, hello, PATIENCE).await?;
        Session::new(device).serve(link, pending()).await
    });
    let mut admitted = listener.accept(PATIENCE).await.unwrap();
    admitted
        .sender
        .send(&ToShard::Welcome {
            world_size: 1,
            generation: 0,
            pid: std::process::id(),
        })
        .await
        .unwrap();
    // The listener's socket carries the link.
    tokio::spawn(async move {
        pending::<()>().await;
        drop(listener);
    });
    (session, admitted)
}

async fn end(session: JoinHandle<Result<End>>) -> Result<End> {
    timeout(PATIENCE, session).await.unwrap().unwrap()
}

fn join(epoch: u32) -> ToShard {
    ToShard::JoinComm {
        epoch: Epoch(epoch),
        comm_id: vec![7],
    }
}

#[tokio::test]
async fn a_device_that_stays_in_its_collective_ends_the_process() {
    let (device, mut fake) = device();
    let (session, mut coordinator) = start(device).await;
    coordinator.sender.send(&join(1)).await.unwrap();
    let Command::JoinComm { abort, .. } = fake.next().await else {
        panic!("not a join");
    };
    assert!(!abort.is_aborted());
    let started = Instant::now();
    coordinator
        .sender
        .send(&ToShard::Abort { epoch: Epoch(1) })
        .await
        .unwrap();
    assert!(matches!(fake.next().await, Command::Leave(Epoch(1))));
    assert!(abort.is_aborted(), "before the device is asked to leave");
    assert_eq!(end(session).await.unwrap(), End::Stuck);
    let elapsed = started.elapsed();
    assert!(
        (LEAVE_LIMIT..LEAVE_LIMIT + Duration::from_secs(1)).contains(&elapsed),
        "{elapsed:?}"
    );
}

#[tokio::test]
async fn a_device_that_leaves_in_time_lives_on() {
    let (device, mut fake) = device();
    let (session, mut coordinator) = start(device).await;
    coordinator.sender.send(&join(1)).await.unwrap();
    fake.next().await;
    coordinator
        .sender
        .send(&ToShard::Abort { epoch: Epoch(1) })
        .await
        .unwrap();
    fake.next().await;
    fake.left.send_replace(Some(Epoch(1)));
    fake.answer
        .send(FromShard::Aborted { epoch: Epoch(1) })
        .await
        .unwrap();
    let heard = coordinator.receiver.recv().await.unwrap();
    assert_eq!(heard, FromShard::Aborted { epoch: Epoch(1) });
    tokio::time::sleep(LEAVE_LIMIT + Duration::from_millis(200)).await;
    coordinator.sender.send(&join(2)).await.unwrap();
    assert!(matches!(
        fake.next().await,
        Command::JoinComm {
            epoch: Epoch(2),
            ..
        }
    ));
    coordinator.sender.send(&ToShard::Stop).await.unwrap();
    assert_eq!(end(session).await.unwrap(), End::Stopped);
}

#[tokio::test]
async fn an_abort_that_overtakes_ends_what_comes_after_it() {
    let (device, mut fake) = device();
    let (_session, mut coordinator) = start(device).await;
    coordinator
        .sender
        .send(&ToShard::Abort { epoch: Epoch(3) })
        .await
        .unwrap();
    let heard = coordinator.receiver.recv().await.unwrap();
    assert_eq!(heard, FromShard::Aborted { epoch: Epoch(3) });
    let plan = StepPlan {
        epoch: Epoch(3),
        step: Step(0),
        rows: vec![],
    };
    for late in [
        join(3),
        join(2),
        ToShard::MakeComm { epoch: Epoch(3) },
        ToShard::Run(Box::new(plan)),
    ] {
        coordinator.sender.send(&late).await.unwrap();
    }
    coordinator
        .sender
        .send(&ToShard::MakeComm { epoch: Epoch(4) })
        .await
        .unwrap();
    let first = fake.next().await;
    assert!(matches!(first, Command::MakeComm(Epoch(4))), "{first:?}");
}

#[tokio::test]
async fn more_commands_than_may_wait_break_the_protocol() {
    let (device, _fake) = device();
    let (session, mut coordinator) = start(device).await;
    for epoch in 0..5 {
        coordinator
            .sender
            .send(&ToShard::MakeComm {
                epoch: Epoch(epoch),
            })
            .await
            .unwrap();
    }
    let error = end(session).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("more commands than may wait"),
        "{error:#}"
    );
}

#[tokio::test]
async fn a_device_thread_that_is_gone_ends_the_session() {
    for last_words in [None, Some("the sentence")] {
        let (device, fake) = device();
        let (session, mut coordinator) = start(device).await;
        if let Some(reason) = last_words {
            let reason = reason.to_owned();
            fake.answer
                .send(FromShard::Failed { reason })
                .await
                .unwrap();
        }
        drop(fake);
        let error = end(session).await.unwrap_err().to_string();
        assert_eq!(error, last_words.unwrap_or("the device thread ended"));
        if let Some(reason) = last_words {
            let reason = reason.to_owned();
            let heard = coordinator.receiver.recv().await.unwrap();
            assert_eq!(heard, FromShard::Failed { reason });
        }
    }
}
