//! Whoever has no business at the port: no key, a stranger's, an old or a used one, another rank's; a recording of
//! somebody who had; noise. None is admitted, and the links that exist go on at their pace.

use super::tests::{LIMIT, LOOPBACK, Setup, hello, setup};
use super::*;
use crate::random::{Random, seed};
use crate::wire::{FromShard, ToShard};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::UdpSocket;
use tokio::time::Instant;

/// Attempts of each kind.
const ATTEMPTS: usize = 60;
/// Datagrams of noise, and the longest.
const DATAGRAMS: usize = 30_000;
const LONGEST: usize = 1500;
/// Messages there and back before and during the attack.
const ROUND_TRIPS: usize = 400;
/// What 99 of 100 may take in a debug build whose attackers share its cores.
const PACE: Duration = Duration::from_millis(50);

/// A client's TLS without a certificate.
fn anonymous(coordinator: &Certificate, alpn: &[u8]) -> quinn::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(tls::PinnedServer::new(coordinator.clone())))
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    quinn::ClientConfig::new(Arc::new(tls))
}

async fn is_refused_without_certificate(setup: &Setup, alpn: &[u8]) {
    let config = anonymous(setup.listener.certificate(), alpn);
    let endpoint = endpoint((LOOPBACK, 0).into()).unwrap();
    let connecting = endpoint
        .connect_with(config, setup.address, tls::NAME)
        .unwrap();
    // With TLS 1.3 the client may believe itself connected for a moment.
    let error = match timeout(LIMIT, connecting).await.unwrap() {
        Ok(connection) => timeout(LIMIT, connection.closed()).await.unwrap(),
        Err(error) => error,
    };
    let error = LinkError::from(error);
    assert!(matches!(error, LinkError::Refused(_)), "{error:?}");
}

async fn is_refused(setup: &Setup, identity: &Identity, rank: u32) {
    let certificate = setup.listener.certificate();
    let refused = connect(setup.address, certificate, identity, hello(rank), LIMIT).await;
    assert!(matches!(refused, Err(LinkError::Refused(_))), "{refused:?}");
}

/// Carries datagrams to `to` and back, and keeps those that go there.
async fn recorder(to: SocketAddr, tape: Arc<Mutex<Vec<Vec<u8>>>>) -> SocketAddr {
    let bind = || UdpSocket::bind((LOOPBACK, 0));
    let (near, far) = (bind().await.unwrap(), bind().await.unwrap());
    let address = near.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut ours, mut theirs) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((length, from)) = near.recv_from(&mut ours) => {
                    client = Some(from);
                    tape.lock().unwrap().push(ours[..length].to_vec());
                    let _ = far.send_to(&ours[..length], to).await;
                }
                Ok((length, _)) = far.recv_from(&mut theirs) => if let Some(client) = client {
                    let _ = near.send_to(&theirs[..length], client).await;
                }
            }
        }
    });
    address
}

/// Messages there and back; how long 99 of 100 took at most.
async fn pace(links: &mut (Admitted, Connected), until: Option<&AtomicBool>) -> Duration {
    let (coordinator, shard) = links;
    let mut times = Vec::new();
    while until.map_or(times.len() < ROUND_TRIPS, |done| {
        !done.load(Ordering::Relaxed)
    }) {
        let begun = Instant::now();
        let number = u32::try_from(times.len()).unwrap();
        let sent = ToShard::Allocate { num_blocks: number };
        coordinator.sender.send(&sent).await.unwrap();
        assert_eq!(shard.receiver.recv_within(LIMIT).await.as_ref(), Ok(&sent));
        let answer = FromShard::Allocated {
            kv_bytes: number.into(),
        };
        shard.sender.send(&answer).await.unwrap();
        assert_eq!(coordinator.receiver.recv_within(LIMIT).await, Ok(answer));
        times.push(begun.elapsed());
    }
    times.sort();
    times[times.len() * 99 / 100]
}

async fn noise(to: SocketAddr, tape: &[Vec<u8>]) {
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let mut random = Random::new(seed(19));
    for number in 0..DATAGRAMS {
        // Of nothing, of what looks like a packet, and of true ones with a few bits changed.
        let mut bytes = if random.below(3) == 0 && !tape.is_empty() {
            random.pick(tape).clone()
        } else {
            let length = random.below(LONGEST);
            (0..length)
                .map(|_| random.next().to_le_bytes()[0])
                .collect()
        };
        for _ in 0..random.below(3) {
            if let Some(at) = bytes.len().checked_sub(1) {
                bytes[random.below(at + 1)] ^= 1 << random.below(8);
            }
        }
        let _ = socket.send_to(&bytes, to).await;
        if number % 64 == 0 {
            // Else most would be lost on the way, which is no test.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Every kind of stranger, one after the other.
async fn knock(setup: &Setup, (used, old, other): (&Identity, &Identity, &Identity)) {
    for _ in 0..ATTEMPTS {
        is_refused_without_certificate(setup, ALPN).await;
        is_refused(setup, &Identity::generate().unwrap(), 0).await;
        is_refused(setup, used, 0).await;
        is_refused(setup, old, 0).await;
        is_refused(setup, other, 0).await;
    }
    is_refused_without_certificate(setup, b"h3").await;
    // The other way round: the address answers, but with another key than was handed over.
    let wrong = Identity::generate().unwrap();
    let refused = connect(setup.address, wrong.certificate(), other, hello(1), LIMIT).await;
    assert!(matches!(refused, Err(LinkError::Refused(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_and_disturb_nobody() {
    let mut setup = setup(3);
    // One who has business here, recorded.
    let tape = Arc::default();
    let (direct, address) = (
        setup.address,
        recorder(setup.address, Arc::clone(&tape)).await,
    );
    setup.address = address;
    let mut links = setup.link(0).await;
    setup.address = direct;
    let alone = pace(&mut links, None).await;
    let tape = tape.lock().unwrap().clone();
    assert!(tape.len() > 10, "only {} datagrams", tape.len());

    // Rank 2 was expected with another key before: as one of an earlier launch.
    let old = setup.identities.pop().unwrap();
    let new = Identity::generate().unwrap();
    setup.listener.expect(Rank(2), new.certificate().clone());
    setup.identities.push(new);
    let done = AtomicBool::new(false);
    let attack = async {
        let who = (&setup.identities[0], &old, &setup.identities[1]);
        tokio::join!(knock(&setup, who), noise(direct, &tape), async {
            let replay = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
            for datagram in tape.iter().cycle().take(10 * tape.len()) {
                replay.send_to(datagram, direct).await.unwrap();
            }
        });
        done.store(true, Ordering::Relaxed);
    };
    let (attacked, ()) = tokio::join!(pace(&mut links, Some(&done)), attack);
    println!("there and back: {alone:.1?} alone, {attacked:.1?} under attack (p99)");
    assert!(attacked < PACE, "{attacked:?}");
    // Who has an expected certificate and is another rank is reported; nobody else, and nobody is admitted.
    loop {
        match setup.listener.accept(Duration::from_millis(300)).await {
            Err(LinkError::NotAdmitted {
                rank: Rank(1),
                reason,
                ..
            }) => assert!(reason.contains("`rank` is 0"), "{reason}"),
            Err(LinkError::TimedOut(_)) => break,
            other => panic!("{other:?}"),
        }
    }
    // Those who are expected still get in.
    setup.link(1).await;
    setup.link(2).await;
}
