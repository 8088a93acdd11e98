//! Prints how much faster the CPU backend multiplies with quantised weights than with bfloat16.
//!
//! `cargo run --release -p kernels --example quantized_speed [-- THREADS [ROUNDS [CPU_ISA]]]`. One run is all products of
//! some layers shaped like a model of half a billion parameters, more than caches hold. Formats take turns, and what is
//! printed are medians over the rounds, of wall time and, where the machine is busy with other things, too, of CPU time of
//! one thread, and the ratios. `amx` and `avx512vnni` compared show what matrix tiles are worth: all are
//! multiplied on them but integers with one row.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "it measures and prints"
)]

use kernels::backend::{Backend, DeviceError, Element, HostMatrix, Precision};
use kernels::cpu::{CpuBackend, CpuTensor, CpuWeight};
use kernels::quantized::{Code, HostQuantized};
use rustix::time::{ClockId, clock_gettime};
use std::time::Instant;

/// `[out, in]` of the products of a layer: query, key and value; output; gate and up; down.
const SHAPES: [(usize, usize); 4] = [(1152, 896), (896, 896), (9728, 896), (896, 4864)];

const LAYERS: usize = 8;

const ROWS: [usize; 7] = [1, 4, 8, 16, 32, 128, 512];

/// What weights are stored as: codes in groups of so many columns (0: all), or bfloat16.
type Format = Option<(Code, usize)>;

const FORMATS: [Format; 6] = [
    None,
    Some((Code::Int8, 0)),
    Some((Code::Int4, 128)),
    Some((Code::Int4, 32)),
    Some((Code::Fp8, 0)),
    Some((Code::Fp8, 128)),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let argument = |index: usize, default: usize| {
        let given = std::env::args().nth(index);
        given.map_or(Ok(default), |count| count.parse())
    };
    let (threads, rounds) = (argument(1, 2)?, argument(2, 9)?);
    let isa = std::env::args().nth(3).unwrap_or("auto".into());
    let cpu = CpuBackend::with_isa(threads, None, &isa)?;
    println!("{}", cpu.name());
    let models = FORMATS.map(|format| Model::load(&cpu, format));
    let models: Vec<Model> = models.into_iter().collect::<Result<_, _>>()?;
    for rows in ROWS {
        println!("{rows} rows");
        let tensor = |width| cpu.allocate(rows, width, Precision::Compute);
        let mut xs = Vec::new();
        for (outputs, inputs) in SHAPES {
            let mut x = tensor(inputs)?;
            let values: Vec<f32> = (0..rows * inputs).map(|i| (i as f32).sin()).collect();
            cpu.write(&values, &mut x)?;
            xs.push((x, tensor(outputs)?));
        }
        let mut times = vec![Vec::new(); models.len()];
        for _ in 0..rounds {
            for (model, times) in models.iter().zip(&mut times) {
                let (start, cpu_start) = (Instant::now(), cpu_now());
                model.run(&cpu, &mut xs);
                let wall = start.elapsed().as_secs_f64();
                times.push((wall, (cpu_now() - cpu_start) / threads as f64));
            }
        }
        let wall = |times: &Vec<(f64, f64)>| median(times.iter().map(|time| time.0));
        let cpu_time = |times: &Vec<(f64, f64)>| median(times.iter().map(|time| time.1));
        for ((format, model), taken) in FORMATS.iter().zip(&models).zip(&times) {
            println!(
                "  {:28} {:9.0} us, {:5.2} x bf16 ({:9.0} us of CPU, {:5.2} x), {:5.1} GB/s of codes",
                format.map_or("bf16".into(), |(code, group)| format!(
                    "{code:?} by {group}"
                )),
                wall(taken) * 1e6,
                wall(&times[0]) / wall(taken),
                cpu_time(taken) * 1e6,
                cpu_time(&times[0]) / cpu_time(taken),
                model.bytes as f64 / wall(taken) / 1e9
            );
        }
    }
    Ok(())
}

/// The weights of all layers.
struct Model {
    weights: Vec<CpuWeight>,
    bytes: u64,
}

impl Model {
    fn load(cpu: &CpuBackend, format: Format) -> Result<Self, DeviceError> {
        let (mut bytes, mut weights) = (0, Vec::new());
        let start = Instant::now();
        for _ in 0..LAYERS {
            for shape in SHAPES {
                weights.push(weight(cpu, format, shape, &mut bytes)?);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        println!("{format:?}: {bytes} bytes loaded in {seconds:.2} s");
        Ok(Self { weights, bytes })
    }

    fn run(&self, cpu: &CpuBackend, tensors: &mut [(CpuTensor, CpuTensor)]) {
        for layer in self.weights.chunks_exact(SHAPES.len()) {
            for (weight, (x, out)) in layer.iter().zip(&mut *tensors) {
                cpu.linear(x, weight, None, out);
            }
        }
    }
}

fn weight(
    cpu: &CpuBackend,
    format: Format,
    (rows, cols): (usize, usize),
    bytes: &mut u64,
) -> Result<CpuWeight, DeviceError> {
    let mut progress = |done| *bytes += done;
    let Some((code, group)) = format else {
        let matrix = HostMatrix {
            data: vec![0x3c; rows * cols * 2].into(),
            element: Element::Bf16,
            rows,
            cols,
            row_stride: cols,
        };
        return cpu.load(&[matrix], Element::Bf16, &mut progress);
    };
    let group = if group == 0 { cols } else { group };
    let groups = cols / group;
    let most = if code == Code::Int4 { 16 } else { 120 };
    let codes: Vec<u8> = (0_u8..most).cycle().take(rows * cols).collect();
    let matrix = HostQuantized {
        code,
        data: codes.into(),
        rows,
        cols,
        row_stride: cols,
        inputs: None,
        group_ends: (1..=groups).map(|end| end * group).collect(),
        scales: vec![0.125; rows * groups],
        zeros: match code {
            Code::Int4 => (7..9).cycle().take(rows * groups).collect(),
            Code::Int8 | Code::Fp8 => Vec::new(),
        },
    };
    cpu.load_quantized(&[matrix], &mut progress)
}

/// CPU time of all threads, in seconds.
fn cpu_now() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
