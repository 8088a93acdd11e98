//! What the clients know of their sequences, from events alone, and what they are owed.

use crate::oracle::{Rng, chain, choose, prefix_of, score};
use crate::shard::Row;
use crate::world::Seen;
use coordinator::scheduler::request::{
    Event, EventKind, FinishReason, Refusal, Request, SequenceId,
};
use coordinator::scheduler::{SchedulerConfig, Stats};
use std::collections::{BTreeMap, BTreeSet};
use topology::wire::{Sampling, StepPlan, TokenScore};

/// One client's view of a sequence.
#[derive(Debug)]
struct Live {
    request: Request,
    /// Prompt and what was received.
    tokens: Vec<u32>,
    started: bool,
    scored: bool,
    arrival: u64,
    /// Steps since it came, and how many it may take to end (S4).
    age: u64,
    patience: u64,
    /// Faults since its last token.
    faults: u32,
}

/// All sequences that have not ended.
#[derive(Debug)]
pub(crate) struct Ledger {
    live: BTreeMap<SequenceId, Live>,
    /// Cancelled, and not yet told so.
    cancelled: Option<SequenceId>,
    next_arrival: u64,
    block_size: usize,
    longest: u64,
    /// Prefixes at the borders of blocks, with their salt, that some sequence since the last fault
    /// had: what a hit may be on.
    known: BTreeSet<(u64, u64)>,
}

impl Ledger {
    pub(crate) fn new(config: &SchedulerConfig) -> Self {
        Self {
            live: BTreeMap::new(),
            cancelled: None,
            next_arrival: 0,
            block_size: config.block_size as usize,
            longest: config.max_sequence_tokens() as u64,
            known: BTreeSet::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.live.len()
    }

    /// The name of one live sequence.
    pub(crate) fn any(&self, rng: &mut Rng) -> Option<SequenceId> {
        let index = rng.below(self.live.len().max(1) as u64);
        let index = usize::try_from(index).expect("small");
        self.live.keys().nth(index).copied()
    }

    /// What the scheduler has to say to a submission.
    pub(crate) fn verdict(
        &self,
        requests: &[Request],
        config: &SchedulerConfig,
    ) -> Result<(), Refusal> {
        let limit = config.max_sequence_tokens();
        for Request {
            prompt, max_tokens, ..
        } in requests
        {
            let (prompt, max_tokens) = (prompt.len(), *max_tokens);
            if prompt + max_tokens as usize > limit {
                return Err(Refusal::TooLong {
                    prompt,
                    max_tokens,
                    limit,
                });
            }
        }
        let asked = requests.len();
        let asked_tokens = requests.iter().map(|r| r.prompt.len()).sum::<usize>();
        let (queued, queued_tokens) = self.queued();
        let limit = config.max_num_queued_reqs;
        let token_limit = config.max_num_queued_tokens;
        if asked > limit {
            Err(Refusal::TooLarge {
                what: "sequences",
                asked,
                limit,
            })
        } else if asked_tokens > token_limit {
            let (asked, limit) = (asked_tokens, token_limit);
            Err(Refusal::TooLarge {
                what: "prompt tokens",
                asked,
                limit,
            })
        } else if queued + asked > limit {
            Err(Refusal::TooManyRequests {
                waiting: queued,
                limit,
            })
        } else if queued_tokens + asked_tokens > token_limit {
            Err(Refusal::TooManyTokens {
                waiting: queued_tokens,
                limit: token_limit,
            })
        } else {
            Ok(())
        }
    }

    /// They were accepted.
    pub(crate) fn add(&mut self, requests: Vec<Request>) {
        for request in requests {
            let mut ahead = 1;
            for other in self.live.values_mut() {
                if other.request.priority <= request.priority {
                    ahead += 1;
                } else {
                    other.patience += 3 * self.longest;
                }
            }
            let live = Live {
                tokens: request.prompt.to_vec(),
                started: false,
                scored: false,
                arrival: self.next_arrival,
                age: 0,
                // Whoever is first in order waits for those that run, perhaps for a prefix, and
                // then runs: each at most the longest sequence's number of steps.
                patience: ahead * 3 * self.longest,
                faults: 0,
                request,
            };
            self.next_arrival += 1;
            self.live.insert(live.request.id, live);
        }
    }

    /// A client leaves; says whether it was there.
    pub(crate) fn cancel(&mut self, id: SequenceId) -> bool {
        let known = self.live.contains_key(&id);
        self.cancelled = known.then_some(id);
        known
    }

    /// A fault: all have to be computed anew.
    pub(crate) fn forget_computation(&mut self) {
        self.known.clear();
        let again = 3 * self.longest * self.live.len() as u64;
        for live in self.live.values_mut() {
            live.patience += again;
            live.faults += 1;
            if live.started {
                live.know_borders(&mut self.known, self.block_size);
            }
        }
    }

    /// S4: everyone's age is bounded.
    pub(crate) fn step_planned(&mut self, plan: &StepPlan) {
        for live in self.live.values_mut() {
            live.age += 1;
            assert!(live.age <= live.patience, "S4: starved: {live:?} {plan:?}");
        }
    }

    /// Each row is a step of a live sequence, with all that the client asked for.
    pub(crate) fn check_rows(&self, rows: &[Row]) {
        let by_seed: BTreeMap<u64, &Live> = self
            .live
            .values()
            .map(|live| (live.request.sampling.seed, live))
            .collect();
        for computed in rows {
            let Some(sampling) = &computed.sampling else {
                continue;
            };
            // A client that left during the step has no more say.
            if let Some(live) = by_seed.get(&sampling.seed) {
                assert_eq!(computed.tokens, live.tokens, "a row computes other tokens");
                assert_eq!(*sampling, live.sampling());
            }
        }
    }

    /// The scheduler counts as the clients do.
    pub(crate) fn check(&self, stats: &Stats) {
        assert_eq!(stats.running + stats.waiting, self.live.len(), "S1");
        assert_eq!((stats.queued, stats.queued_tokens), self.queued(), "S7");
    }

    /// One event, and whether it may be.
    pub(crate) fn event(&mut self, event: Event, seen: &mut Seen) {
        let Event { id, kind } = event;
        if let EventKind::Started { cached_tokens } = kind {
            self.started(id, cached_tokens as usize);
            return;
        }
        let live = self.live.get_mut(&id);
        let live = live.unwrap_or_else(|| panic!("S1, S8: {id:?} has ended: {kind:?}"));
        assert!(
            self.cancelled.is_none() || matches!(kind, EventKind::Finished(_)),
            "S8"
        );
        match kind {
            EventKind::Started { .. } => unreachable!("answered above"),
            EventKind::PromptScores(scores) => {
                assert!(live.started && !live.scored && live.generated() == 0);
                assert_eq!(scores, live.expected_scores(), "chunked = whole");
                live.scored = true;
                seen.scored_prompts += 1;
            }
            EventKind::Token {
                index,
                token,
                score,
            } => {
                assert!(live.started);
                assert_eq!(index as usize, live.generated(), "a gap or a repeat");
                let expected = choose(prefix_of(&live.tokens), &live.sampling());
                assert_eq!(
                    token, expected.token,
                    "another token than undisturbed: {live:?}"
                );
                assert_eq!(score, expected.score);
                live.tokens.push(token);
                live.faults = 0;
                live.know_borders(&mut self.known, self.block_size);
            }
            EventKind::Finished(reason) => {
                if reason == FinishReason::Cancelled {
                    assert_eq!(self.cancelled.take(), Some(id), "S1: nobody cancelled it");
                } else if reason == FinishReason::Error {
                    assert!(live.faults >= 6, "given up after {} faults", live.faults);
                    seen.given_up += 1;
                } else {
                    assert_eq!(Some(reason), live.expected_end(), "{live:?}");
                    assert_eq!(live.scored, live.request.prompt_logprobs.is_some());
                    seen.finished += 1;
                }
                self.live.remove(&id);
            }
        }
    }

    /// K7, K12 for what the client is told; S4 for the order of starts.
    fn started(&mut self, id: SequenceId, cached: usize) {
        let live = &self.live[&id];
        assert!(!live.started, "started twice");
        assert_eq!(cached % self.block_size, 0);
        assert!(
            cached < live.tokens.len(),
            "K7: the last token is always computed"
        );
        if cached > 0 {
            let hit = (live.request.cache_salt, prefix_of(&live.tokens[..cached]));
            assert!(
                self.known.contains(&hit),
                "K12: a hit on what nobody of the salt had"
            );
            assert!(live.request.prompt_logprobs.is_none());
        }
        for other in self.live.values() {
            let passed = !other.started
                && other.arrival < live.arrival
                && other.request.priority <= live.request.priority;
            // Only one that waits for a prefix that is on its way is passed over.
            assert!(
                !passed || self.waits_for_prefix(other),
                "S4: {other:?} was passed over by {live:?}"
            );
        }
        let live = self.live.get_mut(&id).expect("it is live");
        live.started = true;
        live.know_borders(&mut self.known, self.block_size);
    }

    fn waits_for_prefix(&self, waiting: &Live) -> bool {
        let first = waiting.tokens.get(..self.block_size);
        first.is_some_and(|first| {
            self.known
                .contains(&(waiting.request.cache_salt, prefix_of(first)))
        })
    }

    fn queued(&self) -> (usize, usize) {
        let queued = || self.live.values().filter(|live| !live.started);
        (
            queued().count(),
            queued().map(|live| live.request.prompt.len()).sum(),
        )
    }
}

impl Live {
    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    fn know_borders(&self, known: &mut BTreeSet<(u64, u64)>, block_size: usize) {
        let mut prefix = crate::oracle::EMPTY;
        for (index, token) in self.tokens.iter().enumerate() {
            prefix = chain(prefix, *token);
            if (index + 1) % block_size == 0 {
                known.insert((self.request.cache_salt, prefix));
            }
        }
    }

    /// What a plan has to say about its next token; written down from the wire's documentation.
    fn sampling(&self) -> Sampling {
        let params = self.request.sampling.clone();
        let generated = &self.tokens[self.request.prompt.len()..];
        let repetition = params.repetition_penalty > 1.0;
        let any = repetition || params.presence_penalty > 0.0 || params.frequency_penalty < 0.0;
        let mut banned = params.banned_token_ids;
        if generated.len() < self.request.min_tokens as usize {
            banned.extend(&self.request.stop_token_ids);
        }
        Sampling {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            seed: params.seed,
            position: u32::try_from(self.tokens.len()).expect("small"),
            logit_bias: params.logit_bias,
            banned,
            allowed: params.allowed_token_ids,
            prompt: if repetition {
                self.request.prompt.to_vec()
            } else {
                vec![]
            },
            generated: if any { generated.to_vec() } else { vec![] },
            logprobs: params.logprobs,
        }
    }

    fn expected_scores(&self) -> Vec<TokenScore> {
        let alternatives = self.request.prompt_logprobs.expect("they were asked for");
        let mut prefix = crate::oracle::EMPTY;
        let pairs = self.request.prompt.windows(2);
        let scores = pairs.map(|pair| {
            prefix = chain(prefix, pair[0]);
            score(prefix, pair[1], alternatives)
        });
        scores.collect()
    }

    fn expected_end(&self) -> Option<FinishReason> {
        let Request {
            min_tokens,
            max_tokens,
            stop_token_ids,
            ..
        } = &self.request;
        let last = self
            .tokens
            .last()
            .filter(|_| self.generated() > *min_tokens as usize);
        if last.is_some_and(|last| stop_token_ids.contains(last)) {
            Some(FinishReason::Stop)
        } else {
            (self.generated() == *max_tokens as usize).then_some(FinishReason::Length)
        }
    }
}
