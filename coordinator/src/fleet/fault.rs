//! What can end an epoch, and which rank it began with.

use std::time::Duration;
use topology::ids::Rank;

/// What the fleet was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Starting processes and exchanging certificates.
    Launch,
    /// Waiting for shards to connect and say who they are.
    Admit,
    /// Reading weights.
    Load,
    /// Taking memory for KV blocks.
    Allocate,
    /// Making the communicator's identity, which one rank does alone.
    MakeComm,
    /// Forming the communicator.
    Join,
    /// Computing a step.
    Step,
    /// Waiting for work.
    Idle,
    /// Leaving a collective of an epoch that is over.
    Leave,
}

impl Phase {
    /// As it stands in messages and in the `phase` label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::Admit => "admit",
            Self::Load => "load",
            Self::Allocate => "allocate",
            Self::MakeComm => "make_comm",
            Self::Join => "join",
            Self::Step => "step",
            Self::Idle => "idle",
            Self::Leave => "leave",
        }
    }
}

/// The group cannot go on as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{cause}", .rank.map(|rank| format!("rank {rank}: ")).unwrap_or_default())]
pub struct Fault {
    /// Where it began, if one rank can be named.
    pub rank: Option<Rank>,
    /// What happened.
    pub cause: Cause,
}

/// What happened to a rank or to the group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// No process came to be.
    #[error("the shard process could not be started: {0}")]
    Launch(String),
    /// The process is gone.
    #[error("the shard process ended ({0})")]
    Exited(String),
    /// The process may live, but it cannot be reached.
    #[error("the link to the shard was lost: {0}")]
    LinkLost(String),
    /// The process may live, but nothing comes from it: it is frozen, or its machine is cut off.
    #[error("nothing was heard of the shard for {}s", .0.as_secs_f32())]
    Silent(Duration),
    /// The shard's own words before it ended.
    #[error("the shard failed: {0}")]
    Failed(String),
    /// Nothing came in time.
    #[error("no answer within {}s ({phase})", .limit.as_secs_f32(), phase = .phase.name())]
    Deadline {
        /// To what.
        phase: Phase,
        /// The time there was.
        limit: Duration,
    },
    /// Ranks did not compute the same plan.
    #[error("the rank computed another plan than the one that was sent")]
    Diverged,
    /// Ranks did not draw the same tokens from the same logits.
    #[error(
        "the rank chose another token than rank 0; --no-async-scheduling leaves the choice to rank 0"
    )]
    ChoseOtherwise,
    /// A message that the protocol does not allow here.
    #[error("unexpected message ({phase}): {message}", phase = .phase.name())]
    Unexpected {
        /// When.
        phase: Phase,
        /// What came, shortened.
        message: String,
    },
    /// Rank 0's answer does not fit the plan.
    #[error("the answer does not fit the plan: {0}")]
    Answer(String),
    /// Not even one sequence of KV blocks fits.
    #[error("{0}")]
    NoRoom(String),
    /// A defect of the coordinator itself.
    #[error("the coordinator's own state is broken: {0}")]
    Coordinator(String),
}

impl Fault {
    /// A fault of one rank.
    pub fn of(rank: Rank, cause: Cause) -> Self {
        Self {
            rank: Some(rank),
            cause,
        }
    }

    /// A fault of the whole group.
    pub fn group(cause: Cause) -> Self {
        Self { rank: None, cause }
    }

    /// Whether the rank it names is to blame. Who does not answer a step or a join in time may wait
    /// for another one within the collective; that comes out when all are told to leave it.
    pub fn is_its_ranks_own(&self) -> bool {
        !matches!(
            self.cause,
            Cause::Deadline {
                phase: Phase::Step | Phase::Join,
                ..
            }
        )
    }

    /// Whether another group of shards could do better: not if it is the coordinator that is wrong.
    pub fn can_be_mended(&self) -> bool {
        !matches!(self.cause, Cause::Coordinator(_) | Cause::NoRoom(_))
    }
}
