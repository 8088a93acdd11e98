//! The journal against a model of it, through random crashes.

use super::journal::{Head, Journal, NotBegun, Refused, State};
use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

const LIMITS: BackgroundLimits = BackgroundLimits {
    requests: 12,
    bytes: 6_000,
    age: Duration::from_secs(100),
    at_once: 1,
};

fn head(tenant: u8, created: u64) -> Head {
    Head {
        api: Api::Chat,
        tenant: Tenant(Some([tenant; 32])),
        model: "demo".into(),
        created,
        seed: u64::MAX - created,
    }
}

fn whose(head: &Head) -> (Api, Tenant) {
    (head.api, head.tenant)
}

/// What should be there: a request's head and body, and its answer.
type Model = BTreeMap<Uuid, (Head, Vec<u8>, Option<Vec<u8>>)>;

fn check(journal: &Journal, model: &Model) {
    let counts = journal.counts();
    let ended = model.values().filter(|it| it.2.is_some()).count();
    assert_eq!(counts.ended, ended);
    assert_eq!(counts.queued + counts.in_progress, model.len() - ended);
    for (id, (head, _, answer)) in model {
        let (found, state) = journal.find(*id, whose(head)).expect("it was accepted");
        assert_eq!(found, *head);
        match (state, answer) {
            (State::Ended(_), Some(answer)) => assert_eq!(journal.answer(*id).unwrap(), *answer),
            (State::Queued | State::InProgress(_), None) => {}
            other => panic!("{id}: {other:?}"),
        }
        let other = Tenant(Some([200; 32]));
        assert!(journal.find(*id, (head.api, other)).is_none());
        assert!(journal.find(*id, (Api::Completions, head.tenant)).is_none());
    }
}

#[test]
fn whatever_happens_nothing_is_lost_and_nothing_is_answered_twice() {
    for seed in 0..40 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), LIMITS).unwrap();
        let (mut model, mut running) = (Model::new(), Vec::new());
        for now in 0..60 {
            let id = Uuid::from_u128(rng.u128(..));
            let body = vec![b'x'; rng.usize(..900)];
            match rng.u8(..10) {
                0..4 => match journal.accept(id, head(rng.u8(..3), now), &body) {
                    Ok(()) => {
                        let head = journal.find(id, (Api::Chat, Tenant::default()));
                        assert!(head.is_none(), "it has an owner");
                        let owner = (0..3).find_map(|tenant| {
                            let head = self::head(tenant, now);
                            journal.find(id, whose(&head)).map(|(head, _)| head)
                        });
                        model.insert(id, (owner.unwrap(), body, None));
                    }
                    Err(Refused::Count(count)) => assert_eq!((count, model.len()), (12, 12)),
                    Err(Refused::Bytes(used, _)) => {
                        assert!(used + body.len() as u64 + 300 > LIMITS.bytes, "{used}");
                    }
                    Err(error) => panic!("{error}"),
                },
                4..6 => {
                    if let Some(task) = journal.begin() {
                        let task = task.unwrap();
                        let (head, body, answer) = &model[&task.id];
                        assert_eq!((&task.head, &task.body), (head, body));
                        assert!(answer.is_none() && !running.contains(&task.id));
                        running.push(task.id);
                    }
                }
                6 | 7 if !running.is_empty() => {
                    let id = running.swap_remove(rng.usize(..running.len()));
                    let is_wanted = model.contains_key(&id);
                    assert_eq!(journal.finish(id, &body, now).unwrap(), is_wanted);
                    assert!(
                        !journal.finish(id, b"another", now).unwrap(),
                        "once is enough"
                    );
                    model.entry(id).and_modify(|it| it.2 = Some(body));
                }
                8 if !model.is_empty() => {
                    let id = *model.keys().nth(rng.usize(..model.len())).unwrap();
                    journal.delete(id).unwrap();
                    model.remove(&id);
                }
                _ => {
                    // Whoever held it dies, in the middle of a write.
                    drop(journal);
                    fs::write(dir.path().join(format!("{}.new", id.simple())), &body).unwrap();
                    journal = Journal::open(dir.path(), LIMITS).unwrap();
                    assert_eq!(journal.counts().in_progress, 0);
                    running.clear();
                }
            }
            check(&journal, &model);
        }
        let files = fs::read_dir(dir.path()).unwrap();
        let bytes: u64 = files.map(|it| it.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(
            journal.counts().bytes,
            bytes,
            "what it takes is what it says"
        );
    }
}

#[test]
fn what_was_accepted_first_is_computed_first_also_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), LIMITS).unwrap();
    for created in 0..9 {
        journal
            .accept(Uuid::new_v4(), head(1, created), b"{}")
            .unwrap();
    }
    let order = |journal: &mut Journal| {
        let next = std::iter::from_fn(|| journal.begin());
        let created: Vec<_> = next.map(|task| task.unwrap().head.created).collect();
        assert_eq!(created, (0..9).collect::<Vec<_>>());
    };
    order(&mut journal);
    order(&mut Journal::open(dir.path(), LIMITS).unwrap());
}

#[test]
fn only_a_request_that_is_not_there_or_not_whole_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), LIMITS).unwrap();
    let ids: Vec<_> = (0..4).map(|_| Uuid::new_v4()).collect();
    for id in &ids {
        journal.accept(*id, head(1, 0), b"{}").unwrap();
    }
    let file = |n: usize| dir.path().join(format!("{}.request", ids[n].simple()));
    fs::remove_file(file(0)).unwrap();
    fs::write(file(1), "{").unwrap();
    for id in &ids[..2] {
        let Some(Err(NotBegun::Lost(lost))) = journal.begin() else {
            panic!("{id} is there");
        };
        assert_eq!(lost.id, *id);
    }
    // The disk does not answer for the third.
    let aside = dir.path().join("aside");
    fs::rename(file(2), &aside).unwrap();
    fs::create_dir(file(2)).unwrap();
    let later = journal.begin().unwrap().unwrap_err();
    assert!(
        matches!(&later, NotBegun::Later(id, _) if *id == ids[2]),
        "{later}"
    );
    let (_, state) = journal.find(ids[2], whose(&head(1, 0))).unwrap();
    assert!(matches!(state, State::Queued), "{state:?}");
    assert_eq!(
        journal.begin().unwrap().unwrap().id,
        ids[3],
        "it stops no other"
    );
    fs::remove_dir(file(2)).unwrap();
    fs::rename(&aside, file(2)).unwrap();
    assert_eq!(journal.begin().unwrap().unwrap().id, ids[2]);
    assert!(journal.begin().is_none());
    for (code, is_shortage) in [(23, true), (24, true), (12, true), (5, false), (2, false)] {
        let error = io::Error::from_raw_os_error(code);
        assert_eq!(journal::is_shortage(&error), is_shortage, "{error}");
    }
}

#[test]
fn what_waits_too_long_is_given_up_and_its_answer_goes_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), LIMITS).unwrap();
    let ids: BTreeSet<_> = (0..3).map(|_| Uuid::new_v4()).collect();
    for id in &ids {
        journal.accept(*id, head(1, 1_000), b"{}").unwrap();
    }
    let running = journal.begin().unwrap().unwrap();
    let done = journal.begin().unwrap().unwrap().id;
    journal
        .finish(done, b"{\"status\":\"completed\"}", 1_050)
        .unwrap();
    assert_eq!(journal.expire(1_099, given_up).unwrap(), 0);
    assert_eq!(journal.expire(1_100, given_up).unwrap(), 2);
    assert!(running.cancelled.is_cancelled());
    assert!(journal.begin().is_none(), "nothing waits any more");
    for id in ids.iter().filter(|id| **id != done) {
        let answer: Value = serde_json::from_slice(&journal.answer(*id).unwrap()).unwrap();
        assert_eq!(answer["status"], "failed");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("too old"), "{message}");
    }
    assert!(!journal.finish(running.id, b"late", 1_101).unwrap());
    assert_eq!(journal.expire(1_150, given_up).unwrap(), 0);
    assert!(journal.find(done, (Api::Chat, head(1, 0).tenant)).is_none());
    assert_eq!(journal.counts().ended, 2);
    assert_eq!(journal.expire(1_200, given_up).unwrap(), 0);
    assert_eq!(journal.counts(), journal::Counts::default());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_journal_says_whether_it_is_still_needed_and_leaves_other_files_alone() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("background");
    let has_work = |now| journal::has_work(&dir, &LIMITS, now);
    let now = unix_seconds();
    assert!(!has_work(now));
    let mut journal = Journal::open(&dir, LIMITS).unwrap();
    fs::write(dir.join("notes.txt"), "x").unwrap();
    let stranger = dir.join(format!("{}.request", Uuid::new_v4().simple()));
    fs::write(&stranger, "{\"of\": \"another version\"}\n").unwrap();
    let id = Uuid::new_v4();
    journal.accept(id, head(1, now), b"{}").unwrap();
    fs::remove_file(&stranger).unwrap();
    assert!(has_work(now) && !has_work(now + 101));
    journal.finish(id, b"{}", now).unwrap();
    assert!(!has_work(now));
    fs::write(&stranger, "{\"of\": \"another version\"}\n").unwrap();
    let journal = Journal::open(&dir, LIMITS).unwrap();
    assert_eq!((journal.counts().queued, journal.counts().ended), (0, 1));
    assert!(stranger.exists() && dir.join("notes.txt").exists());
    let refused = Journal::open(&dir.join("notes.txt"), LIMITS).unwrap_err();
    assert!(
        refused.to_string().contains("cannot use the journal"),
        "{refused}"
    );
}
