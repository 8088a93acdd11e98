//! The process that owns one device: one rank's weights, KV blocks, forward pass and collectives.
//!
//! Knows nothing of requests, HTTP or tokenizers and takes no decision by the clock: each step it
//! is told exactly what to compute. Reading order: [`run`], `session`, `device`, [`engine`], `steps`,
//! [`models::decoder`], [`comm`].

pub mod batch;
mod clock;
pub mod comm;
mod device;
pub mod engine;
mod examine;
mod hold;
mod ladder;
mod layers;
mod log;
pub mod models;
mod probe;
mod run;
pub mod sampler;
mod session;
mod steps;
#[cfg(test)]
mod testing;
pub mod weights;

use anyhow::{Context, Result};
#[cfg(feature = "cuda")]
use comm::nccl::NcclComm;
use comm::{Comm, shm::ShmComm, tcp::TcpComm};
use engine::Place;
pub use examine::examine;
use hold::Seat;
use kernels::backend::{Backend, DeviceError, Element};
use kernels::cpu::CpuBackend;
#[cfg(feature = "cuda")]
use kernels::cuda::CudaBackend;
pub use probe::probe;
use session::{End, Session};
use std::process::ExitCode;
use std::time::Duration;
use topology::launch::Launch;
use topology::launch::attend::Charge;
use topology::launch::child::{self, Parent};
use topology::link::{self, Identity};
use topology::model_files::BuiltInFile;
use topology::placement;
use topology::wire::Hello;
use tracing_subscriber::EnvFilter;

/// How long connecting to the coordinator and being admitted may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What is wrong with asking this build for a GPU.
#[cfg(not(feature = "cuda"))]
const CPU_ONLY: &str = "this build computes on the CPU only; give it cores (--cpus, or `cpus` of its node) or build it with \
                        --features cuda";

/// Exit status when the device did not leave a collective after an abort.
pub const EXIT_STUCK: u8 = 3;

/// What `cluster shard` was started with. Where to connect, as which rank and on which device, the
/// parent says over the pipe.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which log lines to write to standard error, as in `info,shard=debug`.
    pub log: String,
    /// Whose place on this host it takes.
    pub after: Option<Charge>,
}

/// Runs a shard process to its end. `built_in` is the model inside the binary.
///
/// 0 when the coordinator said stop, [`EXIT_STUCK`], or 1 with a sentence in the log.
pub fn run(options: &Options, built_in: &'static [BuiltInFile]) -> ExitCode {
    let logging = tracing_subscriber::fmt()
        .with_writer(log::Log)
        .with_ansi(false)
        .with_env_filter(EnvFilter::new(&options.log));
    // Fails where the process has a subscriber already, which then serves.
    let _ = logging.try_init();
    // One thread serves the link; the device has another.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime.context("start the runtime").and_then(|runtime| {
        let ended = runtime.block_on(launch(options.after.as_ref(), built_in));
        // A read of standard input cannot be cancelled.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(End::Stopped) => ExitCode::SUCCESS,
        Ok(End::Lost(why)) => {
            tracing::error!("the shard ends: {why}");
            ExitCode::FAILURE
        }
        Ok(End::Stuck) => {
            tracing::error!(
                "the device did not leave its collective within {}s of an abort",
                session::LEAVE_LIMIT.as_secs()
            );
            ExitCode::from(EXIT_STUCK)
        }
        Err(error) => {
            tracing::error!("the shard ends: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The one place that chooses backend and communicator.
async fn launch(after: Option<&Charge>, built_in: &'static [BuiltInFile]) -> Result<End> {
    // Two of them have no room on a device.
    after.map(Charge::end).transpose()?;
    let (launch, identity, parent) = child::announce().await?;
    if let Some(hold) = &launch.hold {
        if hold.legacy.is_some() {
            log::fall_back_to(&hold.log);
        } else {
            // On another host nothing is written that nobody would come to read: only once it waits.
            hold.forget_the_dead();
        }
    }
    match launch.device.clone() {
        placement::Device::Cpu { threads, cores } => {
            let cores: Vec<usize> = cores.iter().map(|core| *core as usize).collect();
            let cpu_isa = launch.cpu_isa.clone();
            let make = move || {
                let cores = (!cores.is_empty()).then_some(cores.as_slice());
                CpuBackend::with_isa(threads as usize, cores, &cpu_isa)
            };
            let place = Place {
                rank: launch.rank,
                // What the CPU computes in, so that no instruction set loses anything. (Matrix tiles round what they
                // read: for them 16 bits would do, in half the memory.)
                kv_element: Some(Element::F32),
                quantises_head: true,
                interface: launch.interface,
            };
            let parent = (launch, identity, parent);
            match place.interface {
                None => serve::<CpuBackend, ShmComm>(make, place, built_in, parent).await,
                Some(_) => serve::<CpuBackend, TcpComm>(make, place, built_in, parent).await,
            }
        }
        #[cfg(feature = "cuda")]
        placement::Device::Gpu { index, .. } => {
            let place = Place {
                rank: launch.rank,
                kv_element: None,
                quantises_head: false,
                interface: None,
            };
            let make = move || CudaBackend::new(index as usize);
            serve::<CudaBackend, NcclComm>(make, place, built_in, (launch, identity, parent)).await
        }
        #[cfg(not(feature = "cuda"))]
        placement::Device::Gpu { index, .. } => {
            anyhow::bail!("GPU {index} cannot be used: {CPU_ONLY}")
        }
    }
}

async fn serve<B: Backend, C: Comm<B>>(
    make: impl FnOnce() -> Result<B, DeviceError> + Send + 'static,
    place: Place,
    built_in: &'static [BuiltInFile],
    (launch, identity, parent): (Launch, Identity, Parent),
) -> Result<End> {
    let device = device::start::<B, C>(make, place, built_in).await?;
    let hello = Hello {
        rank: launch.rank,
        pid: std::process::id(),
        device: device.about.name.clone(),
        free_bytes: device.about.free_bytes,
        total_bytes: device.about.total_bytes,
    };
    let (address, certificate) = (launch.coordinator, &launch.certificate);
    let link = link::connect(
        address,
        certificate,
        &identity,
        hello.clone(),
        CONNECT_LIMIT,
    )
    .await
    .with_context(|| format!("connect to the coordinator at {address}"))?;
    tracing::info!(rank = %launch.rank, device = device.about.name, "admitted to the cluster");
    let open_comm = device.open_comm.clone();
    let seat = Seat {
        launch,
        identity,
        hello,
    };
    let session = Session::new(device);
    let ended = hold::serve(session, &seat, link, parent).await;
    // What was made for a communicator that was never formed must not outlive the process.
    C::discard_id(&open_comm.take());
    ended
}
